"""The judge of images, with an encoder of random weights, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from quest_deploy.evaluation import retrieval
from quest_deploy.evaluation.retrieval import STATISTICS, Judge, frechet_distance
from quest_deploy.models.loading import load_model, resolve_source

EYE = np.eye(3)
NAMES, WIDTH, IMAGES = 30, 6, 12


@pytest.fixture(scope="module")
def encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def statistics() -> dict[str, torch.Tensor]:
    names = torch.nn.functional.normalize(torch.randn(NAMES, WIDTH), dim=1)
    spread = torch.randn(WIDTH, WIDTH)
    return {"names": names, "mean": torch.randn(WIDTH), "covariance": spread @ spread.T}


@pytest.fixture(scope="module")
def judge(
    encoder: CLIPVisionModelWithProjection,
    statistics: dict[str, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Judge:
    folder = tmp_path_factory.mktemp("judge")
    encoder.save_pretrained(folder)
    save_file(statistics, folder / STATISTICS)
    return Judge(folder)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (IMAGES, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings(encoder: CLIPVisionModelWithProjection, images: np.ndarray) -> np.ndarray:
    found: np.ndarray = encoder(pixel_values=torch.from_numpy(images)).image_embeds.double().numpy()
    return found


def test_top_1_and_top_5_are_the_shares_whose_prompt_is_among_so_many_nearest_names(
    judge: Judge, statistics: dict[str, torch.Tensor], images: np.ndarray, embeddings: np.ndarray
) -> None:
    cosines = embeddings @ statistics["names"].double().numpy().T
    nearest = np.argsort(-cosines, axis=1)
    # The n-th image is asked for as its n-th nearest name.
    prompts = nearest[np.arange(IMAGES), np.arange(IMAGES)]
    said = judge(images, prompts, images)
    assert (said.top1, said.top5) == (pytest.approx(1 / IMAGES), pytest.approx(5 / IMAGES))
    best = judge(images, nearest[:, 0], images)
    assert (best.top1, best.top5) == (1, 1)
    worst = judge(images, nearest[:, 5], images)
    assert (worst.top1, worst.top5) == (0, 0)


def test_the_frechet_distance_is_that_of_the_embeddings_to_the_real_pictures(
    judge: Judge, statistics: dict[str, torch.Tensor], images: np.ndarray, embeddings: np.ndarray
) -> None:
    mean, covariance = (statistics[x].double().numpy() for x in ("mean", "covariance"))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    found = np.cov(embeddings.T)
    # tr (AB)^(1/2) by the symmetric form, (A^(1/2) B A^(1/2))^(1/2)
    cross = np.sqrt(np.linalg.eigvalsh(root @ found @ root).clip(0)).sum()
    apart = ((embeddings.mean(0) - mean) ** 2).sum()
    expected = apart + np.trace(found) + np.trace(covariance) - 2 * cross
    said = judge(images, np.zeros(IMAGES, np.int64), images)
    assert said.frechet_distance == pytest.approx(expected, rel=1e-5)


def test_the_feature_distance_is_the_mean_over_patches_and_layers_of_features_of_length_1(
    judge: Judge, encoder: CLIPVisionModelWithProjection, images: np.ndarray
) -> None:
    other = images[::-1].copy()
    found = []
    for x in (images, other):
        states = encoder(pixel_values=torch.from_numpy(x), output_hidden_states=True).hidden_states
        layers = np.stack([state[:, 1:].numpy() for state in states[1:]])
        found.append(layers / np.linalg.norm(layers, axis=-1, keepdims=True))
    expected = ((found[0] - found[1]) ** 2).sum(-1).mean()
    prompts = np.zeros(IMAGES, np.int64)
    assert judge(images, prompts, other).feature_distance == pytest.approx(expected, rel=1e-4)
    assert judge(images, prompts, images).feature_distance == 0


def test_images_are_judged_the_same_in_any_number_of_batches(
    judge: Judge, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, others = np.arange(IMAGES), images[::-1].copy()
    whole = judge(images, prompts, others)
    monkeypatch.setattr(retrieval, "BATCH", 5)
    sizes = []
    see = judge._see
    monkeypatch.setattr(judge, "_see", lambda batch: (sizes.append(len(batch)), see(batch))[1])
    parts = judge(images, prompts, others)
    assert set(sizes) == {5, 2}  # of a thousand images, all features at once would take gigabytes
    assert (parts.top1, parts.top5) == (whole.top1, whole.top5)
    assert parts.feature_distance == pytest.approx(whole.feature_distance, rel=1e-5)
    assert parts.frechet_distance == pytest.approx(whole.frechet_distance, rel=1e-4)


def test_the_embedded_models_judge_knows_a_name_for_each_of_its_prompts(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = load_model(resolve_source("emoji"))
    assert model.judge_folder is not None
    judge = Judge(model.judge_folder)
    assert len(judge._statistics["names"]) == model.labels
    lengths = judge._statistics["names"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=2e-3, atol=0)
    assert capfd.readouterr().err == ""


def test_the_distance_between_gaussians_is_the_closed_form() -> None:
    mean = np.asarray([1.0, 2.0, 0.0])
    assert frechet_distance(mean, EYE, mean, EYE) == pytest.approx(0)
    assert frechet_distance(mean, EYE, np.zeros(3), EYE) == pytest.approx(5)
    assert frechet_distance(mean, 4 * EYE, mean, 9 * EYE) == pytest.approx(3 * (3 - 2) ** 2)


def test_the_distance_is_symmetric_where_covariances_do_not_commute() -> None:
    rng = np.random.default_rng(0)
    a, b = (x @ x.T for x in rng.standard_normal((2, 3, 3)))
    zero = np.zeros(3)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(frechet_distance(zero, b, zero, a))
    assert frechet_distance(zero, a, zero, b) > 0


def test_the_distance_survives_a_singular_covariance() -> None:
    singular = np.diag([1.0, 0.0, 0.0])
    assert frechet_distance(np.zeros(3), singular, np.zeros(3), EYE) == pytest.approx(2)


def test_the_distance_of_diagonal_covariances_is_that_of_each_axis() -> None:
    a, b, c, d = np.random.default_rng(0).uniform(0.1, 2, (4, 3))
    expected = ((a - b) ** 2 + (np.sqrt(c) - np.sqrt(d)) ** 2).sum()
    assert frechet_distance(a, np.diag(c), b, np.diag(d)) == pytest.approx(expected)
