"""Properties of texts predicted from their codes, by functions that gradients flow through.

Shapes: N texts, D latent size, I inputs and O outputs of a layer.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t5vae.common import records
from t5vae.common.errors import UserError
from t5vae.common.records import Record
from t5vae.common.section import Line
from t5vae.latent.artifacts import damaged, read_tensors, write_tensors

KINDS = ("ridge", "mlp")
FEWEST = 10
FORMAT_VERSION = 1

Layer = tuple[Tensor, Tensor]  # weight [O, I] and bias [O]


@dataclass(frozen=True, eq=False)
class Property:
    """A property of a text, predicted from its code.

    Attributes:
        name: of the property.
        kind: "ridge" or "mlp".
        r2: share of the variance that was explained on a fifth of the texts, held out; the
            property itself was then fitted on all of them.
        n: how many texts it was fitted on.
        scale: standard deviation of their values.
        layers: float32 weights [O, I] and biases [O], applied in order with ReLU in between.
    """

    name: str
    kind: str
    r2: float
    n: int
    scale: float
    layers: tuple[Layer, ...] = field(repr=False)

    def predict(self, z_ND: Tensor) -> Tensor:
        """Values, float32 [N], of codes, float [N, D]; differentiable, and on their device."""
        states_NI = z_ND.float()
        for i, (weight_OI, bias_O) in enumerate(self.layers):
            states_NI = states_NI.relu() if i else states_NI
            states_NI = states_NI @ weight_OI.T.to(z_ND.device) + bias_O.to(z_ND.device)
        return states_NI[:, 0]


def fit_property(
    codes_ND: Tensor,
    values_N: Sequence[float] | np.ndarray | Tensor,
    *,
    name: str = "",
    kind: str = "ridge",
    seed: int = 0,
) -> Property:
    """Fit a property on the codes of texts and their values.

    Args:
        codes_ND: float [N, D].
        values_N: the property of each text; those that are not finite are left out.
        name: of the property.
        kind: "ridge" for linear regression, its penalty chosen by cross-validation; "mlp" for one
            hidden layer, trained until a fifth that it does not see gets no better.
        seed: of the held-out fifth and of the network's weights and batches.

    Raises:
        UserError: for an unknown kind, as many values as codes not given, fewer than ten finite
            ones, or values that are all the same.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of property {kind!r}; choose ridge or mlp")
    values_N = np.asarray(values_N, dtype=np.float64)
    if len(values_N) != len(codes_ND):
        raise UserError(
            f"the property {name!r} has {len(values_N)} values for {len(codes_ND)} codes; "
            "give one for each"
        )
    known_N = np.isfinite(values_N)
    z_ND, values_N = codes_ND.double().cpu().numpy()[known_N], values_N[known_N]
    if len(values_N) < FEWEST:
        raise UserError(
            f"the property {name!r} is known of {len(values_N)} texts; at least {FEWEST} are needed"
        )
    if np.ptp(values_N) == 0:
        raise UserError(
            f"the property {name!r} is {values_N[0]:g} for all {len(values_N)} texts; "
            "there is nothing to predict"
        )
    order_N = np.random.default_rng(seed).permutation(len(values_N))
    held_out, rest = np.split(order_N, [len(values_N) // 5])
    r2 = _fit(kind, z_ND[rest], values_N[rest], seed).score(z_ND[held_out], values_N[held_out])
    layers = _layers(_fit(kind, z_ND, values_N, seed))
    return Property(name, kind, float(r2), len(values_N), float(values_N.std()), layers)


def save_property(property: Property, path: Path, made_from: dict[str, Any]) -> None:
    """Keep a property in a file, with what it was made from, fit for JSON."""
    tensors: dict[str, Tensor] = {}
    for i, (weight_OI, bias_O) in enumerate(property.layers):
        tensors |= {f"{i}.weight": weight_OI, f"{i}.bias": bias_O}
    about = {key: getattr(property, key) for key in ("name", "kind", "r2", "n", "scale")}
    write_tensors(path, tensors, about, FORMAT_VERSION, made_from)


def load_property(path: Path, made_from: dict[str, Any], latent_size: int) -> Property | None:
    """The property kept in a file; None if there is none, or it was made from something else.

    Args:
        path: the file.
        made_from: as it was kept.
        latent_size: D.

    Raises:
        UserError: the file is damaged.
    """
    kept = read_tensors(path, FORMAT_VERSION, made_from)
    if kept is None:
        return None
    tensors, about = kept
    try:
        said = records.parse(_About, about)
        layers = [(tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in range(len(tensors) // 2)]
        _check_layers(layers, latent_size)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from None
    return Property(**said.model_dump(), layers=tuple(layers))


class _About(Record):
    """What is kept beside the layers."""

    name: Line
    kind: Line
    r2: float
    n: int
    scale: float


def _check_layers(layers: Sequence[Layer], latent_size: int) -> None:
    """Refuse layers that do not lead from a code to one number."""
    inputs = latent_size
    for weight_OI, bias_O in layers:
        outputs = len(bias_O)
        if weight_OI.shape != (outputs, inputs) or bias_O.shape != (outputs,):
            raise ValueError("its layers do not fit together")
        if not all(
            each.dtype == torch.float32 and each.isfinite().all() for each in (weight_OI, bias_O)
        ):
            raise ValueError("its layers are not finite numbers of float32")
        inputs = outputs
    if inputs != 1:
        raise ValueError("its layers predict no number")


def _fit(kind: str, z_ND: np.ndarray, values_N: np.ndarray, seed: int) -> Any:
    """A fitted estimator of scikit-learn, from codes and to values as they are."""
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import RidgeCV
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    estimator = (
        RidgeCV(alphas=np.logspace(-3, 6, 19))
        if kind == "ridge"
        else MLPRegressor(
            hidden_layer_sizes=(128,),
            early_stopping=True,
            validation_fraction=0.2,
            max_iter=500,
            random_state=seed,
        )
    )
    whole = TransformedTargetRegressor(
        make_pipeline(StandardScaler(), estimator), transformer=StandardScaler()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return whole.fit(z_ND, values_N)


def _layers(fitted: Any) -> tuple[Layer, ...]:
    """The layers of a fitted estimator, the scaling of codes and values folded into them."""
    (_, codes), (_, estimator) = fitted.regressor_.steps
    values = fitted.transformer_
    if hasattr(estimator, "coefs_"):
        layers = [
            (weight_IO.T, bias_O)
            for weight_IO, bias_O in zip(estimator.coefs_, estimator.intercepts_, strict=True)
        ]
    else:
        layers = [(estimator.coef_.reshape(1, -1), np.reshape(estimator.intercept_, 1))]
    weight_OI, bias_O = layers[0]
    layers[0] = (weight_OI / codes.scale_, bias_O - weight_OI @ (codes.mean_ / codes.scale_))
    weight_OI, bias_O = layers[-1]
    layers[-1] = (weight_OI * values.scale_, bias_O * values.scale_ + values.mean_)
    return tuple((torch.tensor(w).float(), torch.tensor(b).float()) for w, b in layers)
