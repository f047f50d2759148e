from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_deploy.errors import InputError
from quest_deploy.importers.read import read
from quest_deploy.importers.settings import ImportSettings, Source
from tests.helpers import assert_holds, refused
from tests.quest_deploy.importers.cases import CONTEXT_TOKENS, SD, UNCONDITIONAL, Case

LAYER = "model.middle_block.0.in_layers.2"


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(SD, split=True)


def _message(case: Case, path: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    state = dict(case.state)
    change(state)
    torch.save(state, path)
    with pytest.raises(InputError) as caught:
        read(path, case.config, case.import_settings)
    return str(caught.value)


def test_missing_and_unexpected_keys_are_listed(case: Case, tmp_path: Path) -> None:
    def rename(state: dict[str, Tensor]) -> None:
        state["model.middle_block.0.in_layers.9.alpha"] = state.pop(
            f"{LAYER}.weight_quantizer.alpha"
        )

    message = _message(case, tmp_path / "x", rename)
    missing, unexpected = message.split(";")
    assert_holds(missing, 1, "missing", f"{LAYER}.weight_quantizer.alpha")
    assert_holds(unexpected, 1, "unexpected", "model.middle_block.0.in_layers.9.alpha")


@pytest.mark.parametrize("key", ["weight", "weight_quantizer.delta", "act_quantizer.delta_list"])
def test_a_shape_mismatch_is_named(case: Case, tmp_path: Path, key: str) -> None:
    name = f"{LAYER}.{key}"
    shape = list(case.state[name].shape)
    message = _message(case, tmp_path / "x", lambda state: state.update({name: state[name][:-1]}))
    assert_holds(message, name, [shape[0] - 1, *shape[1:]], shape)


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("act_quantizer.delta_list", 0.0, "zero"),
        ("act_quantizer.zero_point_list", 0.5, "integers"),
        ("weight_quantizer.delta", -1.0, "positive"),
        ("weight", float("nan"), "finite"),
    ],
)
def test_values_that_no_official_run_writes_are_named(
    case: Case, tmp_path: Path, key: str, value: float, fact: str
) -> None:
    name = f"{LAYER}.{key}"
    message = _message(
        case, tmp_path / "x", lambda s: s.update({name: torch.full_like(s[name], value)})
    )
    assert_holds(message, name, fact)


def test_the_scales_of_the_last_timestep_are_ignored(case: Case, tmp_path: Path) -> None:
    assert any("current_delta" in key for key in case.state)
    assert not any("current_delta" in key for key in case.read(tmp_path / "x").tensors)


def test_another_number_of_timesteps_does_not_fit(case: Case, tmp_path: Path) -> None:
    torch.save(case.state, tmp_path / "x")
    other = ImportSettings(Source.QUEST, (900.0, 100.0), 4, 4, 8, 8, False)
    with refused(tmp_path / "x", "act_quantizer.delta_list", [2, 32]):
        read(tmp_path / "x", case.config, other)


def test_a_file_of_code_or_of_anything_but_tensors_is_refused(case: Case, tmp_path: Path) -> None:
    for content in ([1, 2], {"model.x": 3}, case.config):
        torch.save(content, tmp_path / "x")
        with refused(tmp_path / "x", "tensors"):
            read(tmp_path / "x", case.config, case.import_settings)
    (tmp_path / "x").write_bytes(b"nothing")
    for path in (tmp_path / "x", tmp_path / "absent"):
        with refused(path):
            read(path, case.config, case.import_settings)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x: x.to_sparse(), id="sparse"),
        pytest.param(lambda x: x.to("meta"), id="meta"),
        pytest.param(lambda x: x.to(torch.complex64), id="complex"),
        pytest.param(lambda x: x.bool(), id="bool"),
        pytest.param(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), id="quantized"),
        pytest.param(lambda x: torch.nested.nested_tensor([x, x[:1]]), id="nested"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_real_numbers_are_named(
    case: Case, tmp_path: Path, make: Callable[[Tensor], Tensor]
) -> None:
    message = _message(
        case,
        tmp_path / "x",
        lambda state: state.update({"model.out.2.bias": make(state["model.out.2.bias"])}),
    )
    assert_holds(message, "dense", "model.out.2.bias")


def test_a_tensor_of_a_monstrous_shape_is_never_copied(case: Case, tmp_path: Path) -> None:
    huge = torch.zeros(1, dtype=torch.float16).expand(10**13)
    message = _message(case, tmp_path / "x", lambda state: state.update({"model.out.2.bias": huge}))
    assert_holds(message, "model.out.2.bias", [10**13], [4])


def test_tensors_that_are_hardly_in_the_file_are_never_copied(case: Case, tmp_path: Path) -> None:
    def forge(state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            state[key] = torch.zeros((), dtype=torch.float16).expand(value.shape)

    assert_holds(_message(case, tmp_path / "x", forge), tmp_path / "x", "bytes")


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), IndexError("x"), MemoryError(), AttributeError("use weights_only=False")],
)
def test_whatever_torch_raises_at_a_malformed_file_is_the_files_fault(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*args: object, **kw: object) -> None:
        raise error

    (tmp_path / "x").write_bytes(b"malformed")
    monkeypatch.setattr(torch, "load", load)
    with refused(tmp_path / "x", type(error).__name__):
        read(tmp_path / "x", case.config, case.import_settings)


def test_parameters_are_read_as_their_values(case: Case, tmp_path: Path) -> None:
    torch.save(
        {key: torch.nn.Parameter(value) for key, value in case.state.items()}, tmp_path / "x"
    )
    assert not any(
        value.requires_grad
        for value in read(tmp_path / "x", case.config, case.import_settings).tensors.values()
    )


def test_a_checkpoint_of_another_unet_is_refused(case: Case, tmp_path: Path) -> None:
    torch.save(case.state, tmp_path / "x")
    with refused(tmp_path / "x", "missing", "unexpected"):
        read(tmp_path / "x", Case(UNCONDITIONAL).config, case.import_settings)


@pytest.mark.parametrize("params", [SD, UNCONDITIONAL])
def test_context_tokens_that_the_file_or_the_unet_contradicts_are_refused(
    params: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(params)
    case.read(tmp_path / "x")
    other = dataclasses.replace(case.import_settings, context_tokens=CONTEXT_TOKENS + 1)
    facts = (CONTEXT_TOKENS, CONTEXT_TOKENS + 1) if params is SD else ()
    with refused("--context-tokens", *facts):
        read(tmp_path / "x", case.config, other)
    if params is SD:
        same = dataclasses.replace(case.import_settings, context_tokens=CONTEXT_TOKENS)
        assert read(tmp_path / "x", case.config, same).context_tokens == CONTEXT_TOKENS


def test_a_table_for_a_context_of_no_tokens_is_refused(case: Case, tmp_path: Path) -> None:
    def empty(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if "attn2.act_quantizer_w." in name]:
            state[name] = state[name][..., :0]

    assert_holds(_message(case, tmp_path / "x", empty), "attn2.act_quantizer_w.delta_list")


def test_q_diffusion_files_do_not_show_the_context(tmp_path: Path) -> None:
    qdiff = Case(SD, source=Source.QDIFF, options={"activation_bits": 8})
    torch.save(qdiff.state, tmp_path / "x")
    without = ImportSettings(Source.QDIFF, (), 4, 8, 8, 8, False)
    with refused("--context-tokens"):
        read(tmp_path / "x", qdiff.config, without)
