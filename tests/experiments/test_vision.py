"""The label-noise study at a tiny size, from images to report."""

import io
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import kfac
from experiments.vision import edits, study, training
from experiments.vision.__main__ import app
from experiments.vision.data import load_images, noisy_split
from experiments.vision.edits import Setting, VisionScores, counted_tokens
from experiments.vision.training import SHIPPED, VisionRecipe, make_model, train
from lirefs.errors import DataFileError, ProvenanceError, SettingError

TINY = VisionRecipe(width=16, heads=2, mlp=24, epochs=2, batch=32)


@pytest.fixture(scope="module")
def digits():
    return load_images(limit=100)


@pytest.fixture(scope="module")
def split(digits):
    return noisy_split(digits, 0.2, seed=0)


def test_splits_are_disjoint_and_the_noise_has_the_wanted_share(digits, split):
    parts = (split.train, split.validation, split.test)
    assert [len(part) for part in parts] == [60, 20, 20]
    rows = {image.numpy().tobytes() for part in parts for image in part.pixels}
    assert len(rows) == len({image.numpy().tobytes() for image in digits.pixels}) == 100
    assert int(split.noised.sum()) == 12
    other = noisy_split(digits, 0.2, seed=1)
    assert not torch.equal(other.train.labels, split.train.labels)
    clean = noisy_split(digits, 0.0, seed=0)
    assert torch.equal(clean.train.pixels, split.train.pixels)
    assert not clean.noised.any()
    inputs = split.inputs(split.train)
    assert float(inputs.mean()) == pytest.approx(0, abs=1e-4)
    assert float(inputs.std()) == pytest.approx(1, abs=1e-4)


def test_noise_reaches_every_other_class():
    images = load_images()
    split = noisy_split(images, 0.5, seed=0)
    steps = (split.shown - split.train.labels)[split.noised] % 10
    counts = np.bincount(steps.numpy(), minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 0.6 * counts[1:].mean()


def test_images_of_a_folder(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    found = load_images(str(tmp_path), side=6)
    assert found.pixels.shape == (6, 3, 6, 6)
    assert found.classes == ["cat", "dog"]
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert 0 <= float(found.pixels.min()) < float(found.pixels.max()) <= 1
    assert len(load_images(str(tmp_path), side=6, limit=4)) == 4


def test_bad_input_is_named(tmp_path, split, digits):
    with pytest.raises(DataFileError, match="cannot be read"):
        load_images(str(tmp_path))
    with pytest.raises(SettingError, match="noise"):
        noisy_split(digits, 1.0, 0)
    with pytest.raises(SettingError, match="tile"):
        make_model(replace(TINY, patch=3), split, 0)
    with pytest.raises(SettingError, match="cls or all"):
        counted_tokens("patches")
    with pytest.raises(SettingError, match="at least 2"):
        study.run(digits, TINY, tmp_path, seeds=1)
    (tmp_path / "broken-0").write_bytes(b"no weights")
    with pytest.raises(DataFileError, match="remove it"):
        train(split, TINY, 0, tmp_path / "broken-0", progress=False)
    with pytest.raises(DataFileError, match="remove it"):
        train(split, TINY, 0, tmp_path / "none", shipped=tmp_path / "broken-0", progress=False)


@pytest.mark.parametrize("suffix", ["", ".state"])
def test_a_file_that_makes_no_sense_is_refused(split, tmp_path, suffix):
    model = make_model(TINY, split, 0)
    record = training.provenance(split, TINY, 0)
    names = list(model.state_dict())
    whole = {f"weight.{name}" if suffix else name: one for name, one in model.state_dict().items()}
    optimizer = training._optimizer(model, TINY)
    model(pixel_values=split.train.pixels[:2]).logits.sum().backward()
    optimizer.step()
    if suffix:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state[parameter].items():
                whole[f"{key}.{name}"] = value
    key = f"weight.{names[0]}" if suffix else names[0]
    path = tmp_path / f"n{suffix}"
    for wrong in (
        {name: one for name, one in whole.items() if name != key},
        {**whole, "more": torch.zeros(1)},
        {**whole, key: whole[key][:0]},
        {**whole, key: whole[key] * torch.nan},
        {**whole, key: whole[key].double()},
    ):
        training._write(path, wrong, record, 1)
        with pytest.raises(DataFileError, match="remove the file"):
            train(split, TINY, 0, tmp_path / "n", progress=False)
    save_file(whole, path, {"made_of": record, "epochs": "many"})
    with pytest.raises(DataFileError, match="epochs"):
        train(split, TINY, 0, tmp_path / "n", progress=False)


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "a.png")
    (tmp_path / "dog" / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataFileError, match=r"b\.png cannot be decoded"):
        load_images(str(tmp_path), side=4)
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "png")
    whole = buffer.getvalue()
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + whole[24:29]
    large = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    (tmp_path / "dog" / "b.png").write_bytes(large)
    with pytest.raises(DataFileError, match=r"cannot be decoded|50000 x 50000"):
        load_images(str(tmp_path), side=4)


def test_shift_moves_an_image_by_whole_pixels(split):
    """With the largest draw in both axes, a shift of one pixel is a roll with a black edge."""

    recipe = replace(TINY, shift=1.0, grain=0.0)
    pixels = split.train.pixels[:2]
    real = torch.rand
    try:
        torch.rand = lambda *shape, generator: torch.ones(shape)
        moved = training.augment(split, pixels, recipe, torch.Generator())
    finally:
        torch.rand = real
    expected = torch.zeros_like(pixels)
    expected[:, :, :-1, :-1] = pixels[:, :, 1:, 1:]
    torch.testing.assert_close(moved, (expected - split.mean) / split.spread)


def test_interrupted_training_ends_as_an_uninterrupted_one(split, tmp_path, monkeypatch):
    recipe = replace(TINY, epochs=4)
    whole = train(split, recipe, 0, tmp_path / "whole", progress=False)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    save = training._save_state

    def save_and_stop(*arguments):
        save(*arguments)
        if arguments[-1] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(split, recipe, 0, tmp_path / "cut", progress=False)
    assert [path.name for path in tmp_path.iterdir() if "cut" in path.name] == ["cut.state"]
    with pytest.raises(ProvenanceError, match="recipe"):
        train(split, replace(recipe, rate=1.0), 0, tmp_path / "cut", progress=False)
    monkeypatch.setattr(training, "_save_state", save)
    resumed = train(split, recipe, 0, tmp_path / "cut", progress=False)
    read = train(split, recipe, 0, tmp_path / "cut", progress=False)
    for other in (resumed, read):
        for one, two in zip(whole.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(one, two)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def brute_force(model, inputs, name, tokens, draws):
    """Sums of a aᵀ and g gᵀ over single images, tokens and draws, in float64."""
    module = model.get_submodule(name)
    a_sum = g_sum = 0.0
    count = 0
    for image, labels in zip(inputs, draws.T, strict=True):
        kept = {}
        hook = module.register_forward_hook(
            lambda _, args, output, kept=kept: kept.update(a=args[0].detach(), out=output)
        )
        logits = model(pixel_values=image[None]).logits
        hook.remove()
        for label in labels.tolist():
            loss = -logits.log_softmax(-1)[0, label]
            (g,) = torch.autograd.grad(loss, kept["out"], retain_graph=True)
            for token in tokens:
                g_sum = g_sum + torch.outer(g[0, token], g[0, token]) / len(labels)
        for token in tokens:
            a_sum = a_sum + torch.outer(kept["a"][0, token], kept["a"][0, token])
            count += 1
    return a_sum / count, g_sum / count


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_factors_equal_a_brute_force_sum(split, tokens):
    model = make_model(TINY, split, 0).double().eval()
    inputs = split.inputs(split.train).double()[:7]
    targets = kfac.find_targets(model, projections="mlp")
    factors = kfac.collect(
        model,
        list(inputs.split(4)),
        targets,
        samples=3,
        forward=counted_tokens(tokens),
        dtype=torch.float64,
        progress=False,
    )
    contents = kfac.collection.sampling.row_contents(inputs)
    uniforms = kfac.collection.sampling.RowSeeds(0).draw(
        contents, torch.ones(7, dtype=torch.bool), 3
    )
    chances = model(pixel_values=inputs).logits.detach().softmax(-1)
    draws = torch.stack([kfac.collection.sampling.sample_labels(chances, row) for row in uniforms])
    places = [0] if tokens == "cls" else range(5)
    assert len(targets) == 4
    for target in targets:
        a, g = brute_force(model, inputs, target.name, places, draws)
        assert factors.count(target.name) == 7 * len(places)
        torch.testing.assert_close(factors.A(target.name), a)
        torch.testing.assert_close(factors.G(target.name), g)


def test_bands_measure_counted_tokens_only(split):
    model = make_model(TINY, split, 0).eval()
    inputs = split.inputs(split.train)[:6]
    targets = kfac.find_targets(model, [1], "mlp_in")
    forward = counted_tokens("cls")
    factors = kfac.collect(model, [inputs], targets, forward=forward, progress=False)
    profile = kfac.band_profile(model, [inputs[:4], inputs[4:]], factors, forward=forward)
    read = {}
    hook = targets[0].module.register_forward_pre_hook(lambda _, args: read.update(a=args[0]))
    model(pixel_values=inputs)
    hook.remove()
    projected = read["a"][:, 0].detach() @ factors.eigen(targets[0].name).u_in.float()
    expected = projected[:, 2:4].norm(dim=1)  # 10 to 25 % of 16 directions
    np.testing.assert_allclose(profile.norms[:, 0, 1], expected, rtol=1e-4)
    assert profile.tokens.tolist() == [1] * 6


def scores(validation, recited=0.0):
    return [VisionScores(recited, 1 - recited, v, v) for v in validation]


def test_choice_takes_the_smallest_keep_that_validation_allows():
    before = scores([0.90, 0.94])
    sweep = {
        ("K-FAC", "up", 0.5): scores([0.88, 0.92]),
        ("K-FAC", "up", 0.7): scores([0.90, 0.94]),
        ("K-FAC", "down", 0.7): scores([0.91, 0.94], recited=0.9),
        ("K-FAC", "down", 0.9): scores([0.99, 0.99]),
        ("SVD", "down", 0.1): scores([0.99, 0.99]),
    }
    assert study.choose(before, sweep, "K-FAC") == Setting("down", 0.7)
    assert study.choose(before, sweep, "K-FAC", tolerance=0.02) == Setting("up", 0.5)
    assert study.choose(scores([1.0, 1.0]), sweep, "K-FAC") == Setting("down", 0.9)


def test_the_interval_over_seeds_is_students():
    found = study.over_seeds(np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.n) == (2.0, 3)
    assert found.high - 2.0 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)


def test_scores_count_images(split):
    model = make_model(TINY, split, 0).eval()
    found = edits.score(model, split, split)
    said = model(pixel_values=split.inputs(split.train)).logits.argmax(1)
    noised = [i for i in range(60) if split.shown[i] != split.train.labels[i]]
    assert found.recited == sum(int(said[i] == split.shown[i]) for i in noised) / 12
    assert found.recovered == sum(int(said[i] == split.train.labels[i]) for i in noised) / 12
    right = model(pixel_values=split.inputs(split.test)).logits.argmax(1) == split.test.labels
    assert found.test == float(right.sum()) / 20


def test_from_images_to_report(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "KEEPS", (0.5, 0.9))
    monkeypatch.setattr(study, "RANKS", (0.5,))
    options = "--limit 100 --seeds 2 --epochs 2 --width 16 --mlp 24 --noise 0.2 --decays 1"
    arguments = ["--out", str(tmp_path), *options.split()]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "| oracle (no noise) |" in result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert {"unedited", "K-FAC", "EK-FAC", "SVD", "random pairs"} < set(found["variants"])
    assert all(len(own) == 2 for own in found["variants"].values())
    assert [one["weight_decay"] for one in found["decays"]] == [0.5, 1.0]
    assert found["chosen"]["random pairs"] == found["chosen"]["K-FAC"]
    assert len(found["sweep"]) == 3 * (3 * 2 + 1)
    names = {path.name for path in tmp_path.iterdir()}
    figures = {f"{name}.png" for name in ("keep", "blocks", "bands", "decays", "sheet")}
    drawn = {name.replace(".png", ".svg") for name in figures}
    assert names == figures | drawn | {"report.md", "results.json", "models"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    assert len(list((tmp_path / "models").iterdir())) == 5


@pytest.mark.parametrize("seed", range(5))
def test_shipped_networks_are_those_of_the_default_recipe(seed):
    images = load_images()
    for name, noise in (("noised", 0.1), ("oracle", 0.0)):
        split = noisy_split(images, noise, seed)
        record = training.provenance(split, replace(VisionRecipe(), noise=noise), seed)
        assert training._made_of(SHIPPED / f"{name}-{seed}.safetensors") == record
