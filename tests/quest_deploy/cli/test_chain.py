"""The main job, command by command: what each leaves behind and says, with a very small UNet and
with the embedded model's.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import numpy as np
import pytest
from PIL import Image

from exporters.graph_info import graph_info, load_graph
from quest_deploy.artifacts.checkpoint import Checkpoint, load_checkpoint
from quest_deploy.artifacts.reference import load_reference
from quest_deploy.artifacts.workspace import Workspace
from quest_deploy.calibration.sensitivity import select_sensitive
from quest_deploy.cli import descriptions
from quest_deploy.files import read_json, sha256_of
from tests.quest_deploy.support import CHAIN, STAGES, Chain, cli

BACKENDS = ("openvino", "onnxruntime", "tensorrt-rtx")


@pytest.fixture(params=["mini_chain", pytest.param("chain", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest) -> Chain:
    """The small chain, and the embedded model's, which takes minutes."""
    found: Chain = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("step", CHAIN)
def test_every_command_prints_one_json_value_with_its_workspace(made: Chain, step: str) -> None:
    assert made.outcomes[step].json["workspace"] == str(made.root)
    assert "Traceback" not in made.outcomes[step].err


@pytest.mark.parametrize("stage", STAGES)
def test_the_manifest_records_what_every_command_wrote(made: Chain, stage: str) -> None:
    record = Workspace.open(made.root).require(stage)
    assert record.files
    for path, entry in record.files.items():
        assert sha256_of(made.root / path) == entry["sha256"]


def test_the_workspace_has_the_layout_of_the_specification(made: Chain) -> None:
    expected = [
        "manifest.json",
        "checkpoint.safetensors",
        "unet.onnx",
        "unet.onnx.data",
        "reference/reference.json",
    ]
    expected += [f"engines/{backend}/engine.json" for backend in BACKENDS]
    expected += [
        f"reports/{command}-onnxruntime.json" for command in ("verify", "benchmark", "evaluate")
    ]
    expected += ["reports/sensitivity.json", "images/sensitivity.png", "images/openvino-0.png"]
    assert [path for path in expected if not (made.root / path).is_file()] == []
    assert list(made.root.rglob(".tmp-*")) == []


def test_calibrate_tells_the_share_of_weights_and_multiply_adds_at_4_bits(made: Chain) -> None:
    report = made.outcomes["calibrate"].json
    assert report["buckets"] == 3
    layers = load_checkpoint(made.root / "calibrated.safetensors").layers.values()
    for share, cost in (
        ("weights_at_4_bits", [layer.weight_codes.size for layer in layers]),
        ("macs_at_4_bits", [layer.macs for layer in layers]),
    ):
        at_4 = sum(x for x, layer in zip(cost, layers, strict=True) if layer.weight_bits == 4)
        assert 0 < at_4 < sum(cost)
        assert report[share] == pytest.approx(at_4 / sum(cost))


def eight_bit_layers(checkpoint: Checkpoint) -> set[str]:
    """The first and the last convolution, and what the scheme's patterns match."""
    matching = {
        name
        for name in checkpoint.layers
        if any(fnmatchcase(name, pattern) for pattern in checkpoint.scheme.eight_bit_layers)
    }
    return matching | {"conv_in", "conv_out"}


def test_all_layers_have_4_bits_but_those_at_the_ends_and_those_that_are_to_have_8(
    made: Chain,
) -> None:
    checkpoint = load_checkpoint(made.root / "checkpoint.safetensors")
    eight = eight_bit_layers(checkpoint)
    assert {n for n, layer in checkpoint.layers.items() if layer.weight_bits == 8} == eight
    read_at_8 = {n for n in checkpoint.layers if checkpoint.quantizer_of(n).bits == 8}
    assert eight <= read_at_8
    assert {checkpoint.quantizer_of(n).name for n in read_at_8} == {
        checkpoint.quantizer_of(n).name for n in eight
    }


def test_sensitivity_reports_every_layer_and_picks_some_for_stage_2(made: Chain) -> None:
    printed, report = (
        made.outcomes["sensitivity"].json,
        read_json(made.root / "reports" / "sensitivity.json"),
    )
    assert (
        len(printed["layers"]) == len(report["layers"]) == made.outcomes["calibrate"].json["layers"]
    )
    assert {len(layer["bucket_mse"]) for layer in report["layers"]} == {3}
    assert tuple(printed["selected"]) == select_sensitive(report) != ()
    assert not [name for name in printed["selected"] if name.endswith("time_emb_proj")]
    assert Image.open(made.root / "images" / "sensitivity.png").width > 500


def test_sensitivity_names_the_worst_layers_and_kinds_first(made: Chain) -> None:
    details = made.outcomes["sensitivity"].json
    worst = max(details["layers"], key=lambda x: x["mse"])
    _, header, _, first, *rest = descriptions.sensitivity(
        Workspace.open(made.root), details
    ).splitlines()
    assert header.split() == ["layer", "kind", "e-MSE", "relative", "picked"]
    assert first.split() == [
        worst["layer"],
        worst["group"],
        f"{worst['mse']:.1e}",
        f"{worst['relative_mse']:.1e}",
        "yes",
    ]
    shares = [float(line.split()[-1].removesuffix("%")) for line in rest if line.endswith("%")]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=1)


def test_finetune_runs_the_steps_asked_for_and_leaves_no_state(made: Chain) -> None:
    assert made.outcomes["finetune"].json["steps"] == 5
    provenance = load_checkpoint(made.root / "checkpoint.safetensors").provenance
    assert (provenance["method"], provenance["temporal_steps"], provenance["sensitive_steps"]) == (
        "quest",
        2,
        3,
    )
    assert not (made.root / "finetune-state.pt").exists()


def test_export_deploys_the_finetuned_checkpoint(made: Chain) -> None:
    assert made.outcomes["export"].json["method"] == "quest"
    assert "warning" not in made.outcomes["export"].err
    assert graph_info(load_graph(made.root / "unet.onnx")).checkpoint_sha256 == sha256_of(
        made.root / "checkpoint.safetensors"
    )


def test_reference_covers_every_bucket(made: Chain) -> None:
    records, _ = load_reference(made.root / "reference")
    assert {bucket for record in records for bucket in record.entry.buckets} == {0, 1, 2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_says_what_built_it_from_which_graph(made: Chain, backend: str) -> None:
    content = read_json(made.root / "engines" / backend / "engine.json")
    assert content["backend"] == backend
    assert content["graph_sha256"] == sha256_of(made.root / "unet.onnx")
    assert content["checkpoint_sha256"] == sha256_of(made.root / "checkpoint.safetensors")
    assert content["hardware"] == made.outcomes[f"build-engine {backend}"].json["hardware"]


def test_tensorrt_rtx_was_built_for_the_capability_asked_for(made: Chain) -> None:
    built = made.outcomes["build-engine tensorrt-rtx"].json
    assert (built["hardware"]["compute_capabilities"], built["quantize"]) == (["89"], "native")


def test_verify_passes_and_reports_every_bucket_and_layer(made: Chain) -> None:
    report = made.outcomes["verify onnxruntime"].json
    assert report["passed"] is True
    assert [b["bucket"] for b in report["buckets"]] == [0, 1, 2]
    assert len(report["layers"]) == made.outcomes["export"].json["layers"]
    assert sum(b["unexplained"] for b in report["buckets"]) == 0


def test_benchmark_times_fp32_and_static_scales_beside_the_engine(made: Chain) -> None:
    report = made.outcomes["benchmark onnxruntime"].json
    assert {(t["engine"], t["batch"]) for t in report["timings"]} == {
        ("quantized", 2),
        ("static scale", 2),
        ("fp32", 2),
    }
    assert report["speedup_over_fp32"].keys() == report["bucket_selection_cost"].keys() == {"2"}
    assert report["size_ratio_to_fp32"] > 0


def test_generate_draws_each_prompt_as_often_as_asked(made: Chain) -> None:
    details = made.outcomes["generate openvino"].json
    pictures = [np.asarray(Image.open(path)) for path in details["pictures"]]
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * details["images"]
    assert len({picture.tobytes() for picture in pictures}) == details["images"] == 4


def test_generate_draws_a_column_a_label(label_chain: Chain) -> None:
    picture = label_chain.outcomes["generate onnxruntime"].json["picture"]
    assert Image.open(picture).size == ((2 * 9 + 1) * 8, (9 + 1) * 8)


def test_evaluate_judges_fp32_both_fake_quantized_models_and_the_engine(made: Chain) -> None:
    results = made.outcomes["evaluate onnxruntime"].json["results"]
    assert list(results) == ["FP32", "PTQ", "QuEST", "onnxruntime"]
    assert results["FP32"]["pixel_mse"] == 0
    assert results["FP32"]["feature_distance"] == 0
    assert results["FP32"]["epsilon_mse"] == pytest.approx([0, 0, 0], abs=1e-9)
    assert all(error > 0 for error in results["QuEST"]["epsilon_mse"])
    # The engine computes the fake-quantized model; a tie may flip a code here and there.
    assert results["onnxruntime"]["epsilon_mse"] == pytest.approx(
        results["QuEST"]["epsilon_mse"], rel=0.1
    )


def test_a_frechet_distance_of_few_images_is_warned_of(made: Chain) -> None:
    ended = made.outcomes["evaluate onnxruntime"]
    assert ended.json["sampling"]["images"] < 100
    [warning] = [x for x in ended.err.splitlines() if "Frechet distance of" in x]
    assert warning.startswith("warning: ")


def test_evaluate_tells_what_a_judge_says_where_there_is_one_and_the_distances_from_fp32(
    made: Chain,
) -> None:
    details = made.outcomes["evaluate onnxruntime"].json
    judged = ("frechet_distance", "top1", "top5", "feature_distance")
    plain = {
        **details,
        "results": {
            name: {key: value for key, value in quality.items() if key not in judged}
            for name, quality in details["results"].items()
        },
    }
    for shown, columns in ((details, 8), (plain, 4)):
        _, _, _, *rows, picture = descriptions.evaluation(shown).splitlines()
        cells = [re.split(r"  +", row.strip()) for row in rows]
        assert [row[0] for row in cells] == list(details["results"])
        assert {len(row) for row in cells} == {columns + 1}
        assert cells[1][-4] == f"{details['results']['PTQ']['psnr']:.2f}"
        assert details["picture"] in picture
        assert details["picture"] in descriptions.evaluation_summary(shown)
    assert f"{details['results']['FP32']['top1']:.1%}" in descriptions.evaluation_summary(details)


def test_evaluate_shows_eight_images_of_each_at_most_side_by_side_and_records_the_picture(
    made: Chain,
) -> None:
    picture = made.root / "images" / "compare-onnxruntime.png"
    assert made.outcomes["evaluate onnxruntime"].json["picture"] == str(picture)
    assert (
        f"images/{picture.name}" in Workspace.open(made.root).require("evaluate/onnxruntime").files
    )
    width, height = Image.open(picture).size
    assert 4 * 128 < width < 5 * 128
    assert 4 * 128 < height < 5 * 128


@pytest.mark.parametrize("command", ["verify", "benchmark", "evaluate"])
def test_a_report_holds_what_was_printed(made: Chain, command: str) -> None:
    printed = made.outcomes[f"{command} onnxruntime"].json
    assert (
        read_json(made.root / "reports" / f"{command}-onnxruntime.json")
        | {"workspace": str(made.root)}
        == printed
    )


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (".", "workspace"),
        ("checkpoint.safetensors", "checkpoint"),
        ("unet.onnx", "graph"),
        ("engines/openvino", "engine"),
    ],
)
def test_inspect_shows_what_each_thing_holds(made: Chain, path: str, kind: str) -> None:
    shown = cli("inspect", made.root / path, "--json")
    assert (shown.code, shown.json["kind"]) == (0, kind)
    scheme = shown.json.get("scheme") or shown.json["lowered"]["scheme"]
    assert (scheme["weight_bits"], len(scheme["bucket_edges"])) == (4, 2)
    text = cli("inspect", made.root / path)
    assert "first and last layer 8 bits" in text.out
    assert "3 timestep buckets" in text.out
    assert text.code == 0


def test_inspect_lists_the_bits_of_every_layer(made: Chain) -> None:
    shown = cli("inspect", made.root / "checkpoint.safetensors", "--json").json
    bits = {x["layer"]: (x["weight_bits"], x["activation_bits"]) for x in shown["layers"]}
    assert len(bits) == made.outcomes["calibrate"].json["layers"]
    assert bits["conv_in"] == bits["conv_out"] == (8, 8)
    assert bits["down_blocks.0.resnets.0.conv1"] == (4, 4)
    graph = cli("inspect", made.root / "unet.onnx", "--json").json
    eight = len(eight_bit_layers(load_checkpoint(made.root / "checkpoint.safetensors")))
    assert graph["layers_by_weight_bits"] == {"4": len(bits) - eight, "8": eight}
    assert graph["operators"]["quest::TimestepQuantize"] == shown["sites"]


def test_inspect_tells_which_stages_are_up_to_date(made: Chain) -> None:
    stages = cli("inspect", made.root, "--json").json["stages"]
    assert set(stages) == set(STAGES)
    assert {stage["state"] for stage in stages.values()} == {"up to date"}


@pytest.mark.slow
def test_most_of_the_embedded_model_is_at_4_bits_and_its_files_shrink(chain: Chain) -> None:
    calibrated, exported, timed = (
        chain.outcomes[step].json for step in ("calibrate", "export", "benchmark onnxruntime")
    )
    assert 0.6 < calibrated["weights_at_4_bits"] < 0.8
    assert 0.3 < calibrated["macs_at_4_bits"] < 0.8
    assert exported["bytes"] < 0.4 * exported["fp32_weight_bytes"]
    assert timed["size_ratio_to_fp32"] > 2
    assert Image.open(chain.root / "images" / "sensitivity.png").width > 1000


def test_doctor_tells_what_this_machine_builds_and_runs() -> None:
    report = cli("doctor", "--json").json
    assert report["torch"] is None
    assert (
        report["backends"]["onnxruntime"]
        == report["backends"]["openvino"]
        == {"build": None, "run": None}
    )
    assert report["backends"]["tensorrt-rtx"]["build"] is None
    text = cli("doctor")
    assert re.search(r"^openvino\s+yes\s+yes$", text.out, re.MULTILINE)
