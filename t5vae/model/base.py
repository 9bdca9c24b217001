"""A pretrained T5 as the base of a T5-VAE: what it is, its weights, its tokenizer."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from shards.format.tokenizers import load_tokenizer
from t5vae.common.errors import UserError
from t5vae.model.configuration import ARCHITECTURES, SHAPE, T5VAEConfig
from t5vae.model.head import untie


def t5_settings(t5: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a T5, defaults filled in, by transformers' names."""
    whole = AutoConfig.for_model(**{"model_type": "t5", **t5})
    return {"model_type": whole.model_type, **{name: getattr(whole, name) for name in SHAPE}}


def read_base(base: str) -> tuple[dict[str, Any], bool]:
    """What a pretrained T5 is.

    Args:
        base: a folder with a transformers model, or a Hugging Face name.

    Returns:
        Its settings, as `T5VAEConfig.t5` has them, and whether its embeddings are tied.

    Raises:
        UserError: if there is no such model, or it is no T5, mT5 or UMT5.
    """
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # a wrong name or file raises a dozen kinds
        raise UserError(
            f"cannot read model.base {base!r}: give a folder with a pretrained T5, or a Hugging "
            f"Face name ({_reason(error)})"
        ) from None
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"model.base {base!r} is of type {config.model_type!r}; choose a T5, Flan-T5, ByT5, "
            "mT5 or UMT5"
        )
    # Published mT5 and UMT5 have output weights of their own, whatever transformers 5 makes of
    # their configuration; for T5 it remembers by the scale.
    tied = config.model_type == "t5" and config.scale_decoder_outputs
    return {"model_type": config.model_type, **{n: getattr(config, n) for n in SHAPE}}, tied


def load_base(base: str, config: T5VAEConfig) -> PreTrainedModel:
    """A pretrained T5, float32, its embeddings resized to `config`'s vocabulary.

    Rows past the old vocabulary are drawn around the mean of the old ones (Hewitt, 2021, as
    transformers does it).

    Raises:
        UserError: if its weights cannot be read, or do not make a whole T5 as `config` says.
    """
    t5_config = config.t5_config
    t5_config.vocab_size = read_base(base)[0]["vocab_size"]
    try:
        t5, found = AutoModelForSeq2SeqLM.from_pretrained(
            base,
            config=t5_config,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below
        )
    except Exception as error:  # OSError, safetensors' own ...
        raise UserError(
            f"cannot load the weights of model.base {base!r} ({_reason(error)})"
        ) from None
    for key, there, here in found["mismatched_keys"]:
        raise UserError(
            f"model.base {base!r} is not what its config.json says: {key} has the shape "
            f"{list(there)} and not {list(here)}"
        )
    if found["missing_keys"]:
        raise UserError(
            f"model.base {base!r} is not a whole T5: it has no {min(found['missing_keys'])}"
        )
    if not config.tie_word_embeddings:
        untie(t5)
    elif t5.lm_head.weight is not t5.shared.weight:
        raise UserError(
            f"model.base {base!r} has output weights of its own, but its configuration ties them "
            "to the embedding; say tie_word_embeddings: false in its config.json"
        )
    t5.resize_token_embeddings(config.t5_config.vocab_size)
    return t5


def check_tokenizer(base: str, tokenizer: PreTrainedTokenizerBase, shards: str) -> None:
    """Refuse shards that number their pieces otherwise than a pretrained T5 does.

    Args:
        base: as in `read_base`.
        tokenizer: the shards' own. It may have pieces more than the base's, with higher ids.
        shards: what they are called.

    Raises:
        UserError: if a piece has another id, or the base has no tokenizer beside it.
    """
    numbers = load_tokenizer(base).get_vocab()
    last = max(numbers.values())
    differing = {
        piece: number
        for piece, number in tokenizer.get_vocab().items()
        if numbers.get(piece) != number and (piece in numbers or number <= last)
    }
    if differing:
        piece = min(differing, key=differing.__getitem__)
        theirs = numbers.get(piece, "none")
        raise UserError(
            f"the tokenizer of {shards} is not that of model.base {base!r}: {len(differing):,} "
            f"pieces have other numbers, such as {piece!r}: {differing[piece]} there, {theirs} in "
            f"the base; build the shards with --tokenizer {base}"
        )


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
