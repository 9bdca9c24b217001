"""Exports and checkpoints from a stranger, each with one evil thing: none is run, none grows."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5vae.checkpoint import rank_files
from t5vae.checkpoint.manifest import MANIFEST, read_manifest, seal
from tests.strangers.conftest import Handed

MARK = "import os; os.mkdir('marked')\n"
COMMANDS = [
    ["reconstruct", "run", "x = 1"],
    ["sample", "run/export", "-n", "1"],
    ["eval", "run", "--sequences", "4", "--samples", "2"],
]
ids = pytest.mark.parametrize("arguments", COMMANDS, ids=lambda command: command[0])


class Payload:
    """What is run by whoever unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("marked",)


def settings(**changes: Any) -> Callable[[Path], None]:
    """Changes to config.json; t5__NAME is of the T5 inside."""

    def change(export: Path) -> None:
        file = export / "config.json"
        tree = json.loads(file.read_text())
        for name, value in changes.items():
            *inner, leaf = name.split("__")
            (tree["t5"] if inner else tree)[leaf] = value
        file.write_text(json.dumps(tree))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(export: Path) -> None:
        found = load_file(export / "model.safetensors")
        change(found)
        save_file(found, export / "model.safetensors", {"format": "pt"})

    return write


def as_pickle(export: Path) -> None:
    (export / "model.safetensors").unlink()
    (export / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def as_large_as_a_disk(export: Path) -> None:
    os.truncate(export / "config.json", 2**40)


def header(export: Path) -> None:
    (export / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


HARMFUL = {
    "a wide model": settings(t5__d_model=2**30),
    "a deep model": settings(t5__num_layers=2**40),
    "a deep decoder": settings(t5__num_decoder_layers=2**40),
    "many heads": settings(t5__num_heads=2**30),
    "many pieces": settings(t5__vocab_size=2**40),
    "a long code": settings(latent_size=2**50),
    "a long memory": settings(bottleneck="attention", memory_length=2**50),
    "long sequences": settings(sequence_length=2**60),
    "sizes past 64 bits": settings(t5__d_ff=2**70),
    "negative sizes": settings(t5__d_kv=-4),
    "sizes that are text": settings(t5__d_model="8"),
    "an unknown bottleneck": settings(bottleneck="os:system"),
    "a T5 that is a list": settings(t5=[1]),
    "another model's end": settings(t5__eos_token_id=2**40),
    "nesting": lambda export: (export / "config.json").write_text("[" * 10**5),
    "a configuration as large as a disk": as_large_as_a_disk,
    "a pickle": as_pickle,
    "a header of exabytes": header,
    "a weight that is missing": weights(lambda found: found.pop("t5.shared.weight")),
    "a weight of another shape": weights(
        lambda found: found.update({"t5.shared.weight": torch.zeros(3, 8)})
    ),
    "fewer pieces than the tokenizer": lambda export: (
        settings(t5__vocab_size=100)(export),
        weights(lambda found: found.update({"t5.shared.weight": torch.zeros(100, 8)}))(export),
    ),
}


@pytest.mark.parametrize("harm", HARMFUL)
@ids
def test_an_export_that_is_not_what_it_says_is_refused(refused, handed, harm, arguments):
    HARMFUL[harm](handed.run / "export")
    line = refused(*arguments)
    assert "run/export " in line
    assert not Path("marked").exists()


def remote_code(export: Path) -> None:
    for name in ("configuration_evil", "modeling_evil"):
        (export / f"{name}.py").write_text(MARK)
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    settings(auto_map=auto, architectures=["Evil"], trust_remote_code=True)(export)


def other_weights(export: Path) -> None:
    (export / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (export / "training_args.bin").write_bytes(pickle.dumps(Payload()))
    names = {"weight_map": {"t5.shared.weight": "../../../secret"}}
    (export / "model.safetensors.index.json").write_text(json.dumps(names))


def adapter(export: Path) -> None:
    base = {"peft_type": "LORA", "base_model_name_or_path": "../../secret", "auto_mapping": None}
    (export / "adapter_config.json").write_text(json.dumps(base))


def generation(export: Path) -> None:
    (export / "custom_generate").mkdir()
    (export / "custom_generate/generate.py").write_text(MARK)
    (export / "generation_config.json").write_text(json.dumps({"custom_generate": "."}))


HARMLESS = {
    "code of its own": remote_code,
    "a kernel of the hub": settings(attn_implementation="evil/kernel", _attn_implementation="x/y"),
    "a kernel for the T5": settings(
        t5__attn_implementation="evil/kernel", t5___attn_implementation_internal="evil/kernel"
    ),
    "quantization": settings(quantization_config={"quant_method": "evil"}, t5__auto_map={"a": "b"}),
    "pickles beside the weights": other_weights,
    "an adapter": adapter,
    "a generation of its own": generation,
}


@pytest.mark.parametrize("harm", HARMLESS)
@ids
def test_what_else_an_export_names_is_not_looked_at(honest, handed, harm, arguments):
    HARMLESS[harm](handed.run / "export")
    honest(*arguments)
    assert not Path("marked").exists()


# Checkpoints.


def checkpoint(handed: Handed) -> Path:
    (found,) = (handed.run / "checkpoints").iterdir()
    return found


def sealed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's manifest, and what says that it was not."""
    manifest = read_manifest(folder)
    change(manifest)
    (folder / MANIFEST).write_bytes(seal(manifest))


MANIFESTS = {
    "a wide model": lambda m: m["model"]["t5"].update(d_model=2**30),
    "a deep model": lambda m: m["model"]["t5"].update(num_layers=2**40),
    "long sequences": lambda m: m["model"].update(sequence_length=2**60),
    "a model that is a list": lambda m: m.update(model=[]),
    "no model": lambda m: m.pop("model"),
    "a kernel": lambda m: m["model"].update(attn_implementation="evil/kernel", latent_size=2**40),
}


@pytest.mark.parametrize("harm", MANIFESTS)
def test_a_checkpoint_of_another_model_than_it_says_is_not_exported(refused, handed, harm):
    sealed(checkpoint(handed), MANIFESTS[harm])
    line = refused("export", "run", "--dtype", "bf16")
    assert "does not hold the model" in line or "holds no valid checkpoint" in line


@pytest.mark.parametrize("name", ["../../../../secret", "{secret}", "rank-00000.safetensors/.."])
def test_no_file_outside_of_a_checkpoint_is_opened(command, handed, name):
    name = name.format(secret=handed.secret)
    entry = {"bytes": handed.secret.stat().st_size, "sha256": "0" * 64}
    sealed(checkpoint(handed), lambda manifest: manifest["files"].update({name: entry}))
    for arguments in (["export", "run", "--dtype", "bf16"], ["checkpoints", "run", "--verify"]):
        done = command(*arguments)
        assert done.code != 0
        assert done.deeds == []
        assert "Traceback" not in done.err


def test_pieces_that_claim_more_than_their_file_holds_are_damage(tmp_path):
    def write(**header: Any) -> Path:
        text = json.dumps(header).encode()
        path = tmp_path / "rank-00000.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        return path

    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    rank_files.Fragments([write(**{"weight/a/0": whole})])
    with pytest.raises(Exception, match="is damaged"):
        rank_files.Fragments([write(**{"weight/a/0": whole, "weight/a/2": whole})])
    far = rank_files.Fragments([write(**{f"weight/a/{2**60}": whole})])
    with pytest.raises(ValueError, match="0 of 2 elements are saved"):
        far.read("weight", "a", 0, far.length("weight", "a"))


# A base, which is a folder or a name of the Hub's.


def base(handed: Handed, **settings: Any) -> str:
    folder = handed.folder / "base"
    shutil.copytree(handed.shards / "tokenizer", folder)
    (folder / "evil.py").write_text(MARK)
    (folder / "config.json").write_text(json.dumps(settings))
    return f"model.base={folder}"


EVIL = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForSeq2SeqLM": "evil.Evil"}}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": "evil", **EVIL}, "cannot read model.base"),
        ({"model_type": "t5", "num_layers": 2**40}, "num_layers is 1099511627776"),
        ({"model_type": "t5", "vocab_size": 371, "d_ff": 2**40}, "free some space"),
    ],
    ids=["code", "deep", "wide"],
)
def test_a_base_runs_no_code_and_takes_no_memory(refused, handed, settings, says):
    override = base(handed, **settings)
    config = handed.folder / "mine.yaml"
    config.write_text("data: {shards: shards, global_batch_size: 16}\n")
    line = refused("train", config, override, "train.precision=fp32", stdin=b"y\n")
    assert says in line
    assert not Path("marked").exists()
