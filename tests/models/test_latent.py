"""Typical features: the fit against matrices written out, what it does not depend on, and files that are refused."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.latent import FILE, LEAST_ROWS, TypicalFeatures, shrinkage


def drawn(rng: np.random.Generator, rows: int, *, scales: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    return 3.0 + (rng.normal(size=(rows, len(scales))) * scales) @ rotation


def rotation_of(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def shrinkage_by_hand(centred: np.ndarray) -> float:
    """Ledoit & Wolf 2004, Lemmas 3.2 to 3.4, with the paper's norm |A|² = tr(A A') / p and every matrix formed."""
    rows, features = centred.shape
    covariance = centred.T @ centred / rows

    def norm2(matrix: np.ndarray) -> float:
        return float(np.trace(matrix @ matrix.T)) / features

    m = np.trace(covariance) / features
    d2 = norm2(covariance - m * np.eye(features))
    b2 = sum(norm2(np.outer(row, row) - covariance) for row in centred) / rows**2
    return min(b2, d2) / d2


def distances_by_hand(fitted: np.ndarray, judged: np.ndarray, *, max_directions: int) -> np.ndarray:
    """With the whole covariance and its inverse; eigenvalues beyond `max_directions` are averaged."""
    centred = fitted - fitted.mean(axis=0)
    rows, features = centred.shape
    share, covariance = shrinkage_by_hand(centred), centred.T @ centred / rows
    shrunk = (1 - share) * covariance + share * np.trace(covariance) / features * np.eye(features)
    values, vectors = np.linalg.eigh(shrunk)  # ascending
    if (rest := features - max_directions) > 0:
        values[:rest] = values[:rest].mean()
    precision = vectors @ np.diag(1 / values) @ vectors.T
    away = judged - fitted.mean(axis=0)
    return np.sqrt(np.einsum("nf,fg,ng->n", away, precision, away))


@pytest.mark.parametrize(
    ("rows", "features", "max_directions"),
    [(200, 6, 6), (40, 6, 64), (40, 9, 3), (20, 60, 64), (64, 50, 10)],
)
def test_distances_are_those_of_the_definition(rows: int, features: int, max_directions: int) -> None:
    rng = np.random.default_rng(rows)
    scales, rotation = np.geomspace(1, 20, features), rotation_of(rng, features)
    fitted = drawn(rng, rows, scales=scales, rotation=rotation)
    groups = np.arange(rows) // 2
    folds = groups % 4
    # Below a full covariance the directions that no row has are the rest, whatever the bound.
    kept = [min(max_directions, int((folds != fold).sum()) - 1) for fold in range(4)]
    unseen = [
        distances_by_hand(fitted[folds != fold], fitted[folds == fold], max_directions=kept[fold]) for fold in range(4)
    ]
    judged = drawn(rng, 10, scales=2 * scales, rotation=rotation)
    whole = distances_by_hand(fitted, judged, max_directions=min(max_directions, rows - 1))
    found = TypicalFeatures.fit(fitted, groups, max_directions=max_directions).distances(judged)
    np.testing.assert_allclose(found, whole / np.concatenate(unseen).mean(), rtol=1e-9)


def test_shrinkage_is_that_of_the_paper_and_goes_where_it_should() -> None:
    rng = np.random.default_rng(1)
    for rows, features in ((30, 5), (10, 40), (300, 20)):
        centred = rng.normal(size=(rows, features)) * np.geomspace(1, 9, features)
        centred -= centred.mean(axis=0)
        assert shrinkage(centred) == pytest.approx(shrinkage_by_hand(centred), rel=1e-9)
    assert shrinkage(rng.normal(size=(40, 40))) > 0.9, "the target is the truth"
    assert shrinkage(rng.normal(size=(500, 10)) * np.geomspace(1, 30, 10)) < 0.05, "enough rows speak for themselves"


def test_turning_moving_and_stretching_the_space_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    scales, rotation = np.geomspace(1, 10, 30), rotation_of(rng, 30)
    fitted, judged = (drawn(rng, rows, scales=scales, rotation=rotation) for rows in (50, 8))
    other, groups = rotation_of(rng, 30), np.arange(50)
    before = TypicalFeatures.fit(fitted, groups, max_directions=12).distances(judged)
    after = TypicalFeatures.fit(7 * fitted @ other - 100, groups, max_directions=12).distances(7 * judged @ other - 100)
    np.testing.assert_allclose(after, before, rtol=1e-7)
    assert before.std() > 0.01, "they must differ for this test to see anything"


def test_unseen_responses_of_the_same_kind_lie_at_about_one_and_others_beyond() -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        scales, rotation = np.geomspace(0.1, 10, 400), rotation_of(rng, 400)
        fitted, same = (drawn(rng, rows, scales=scales, rotation=rotation) for rows in (256, 100))
        typical = TypicalFeatures.fit(fitted, np.arange(256) // 2)
        assert typical.directions_DH.shape == (64, 400)
        assert typical.distances(same).mean() == pytest.approx(1.0, abs=0.1)
        assert typical.distances(same + 3 * rotation.sum(axis=0)).min() > typical.distances(same).max()


def test_a_pair_does_not_vouch_for_itself() -> None:
    """Two answers that are nearly one: in a fold of their own the fit has not seen either."""
    rng = np.random.default_rng(3)
    rotation, scales = rotation_of(rng, 200), np.ones(200)
    first = drawn(rng, 40, scales=scales, rotation=rotation)
    fitted = np.concatenate([first, first + 0.01 * rng.normal(size=first.shape)])
    same = drawn(rng, 100, scales=scales, rotation=rotation)
    paired = TypicalFeatures.fit(fitted, np.tile(np.arange(40), 2)).distances(same).mean()
    apart = np.concatenate([np.arange(40), 40 + np.roll(np.arange(40), 1)])  # each in another fold than its twin
    alone = TypicalFeatures.fit(fitted, apart).distances(same).mean()
    assert paired == pytest.approx(1.0, abs=0.1)
    assert alone > 1.2, "the groups decided it"


def test_features_that_never_change_give_finite_distances() -> None:
    typical = TypicalFeatures.fit(np.ones((20, 5)), np.arange(20))
    distances = typical.distances(np.array([[1.0] * 5, [2.0] * 5]))
    assert np.isfinite(distances).all()
    assert distances[0] == 0 < distances[1]


def test_what_cannot_be_fitted_is_refused() -> None:
    rows = np.random.default_rng(4).normal(size=(LEAST_ROWS, 3))
    with pytest.raises(ValueError, match="15 rows of 15 groups, needed are 16"):
        TypicalFeatures.fit(rows[1:], np.arange(LEAST_ROWS - 1))
    with pytest.raises(ValueError, match="of 1 groups"):
        TypicalFeatures.fit(rows, np.zeros(LEAST_ROWS, dtype=np.int64))
    rows[3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        TypicalFeatures.fit(rows, np.arange(LEAST_ROWS))


@pytest.fixture
def saved(tmp_path: Path) -> TypicalFeatures:
    rng = np.random.default_rng(5)
    typical = TypicalFeatures.fit(rng.normal(size=(40, 12)) * np.geomspace(1, 9, 12), np.arange(40), max_directions=4)
    typical.save(tmp_path)
    return typical


def test_it_comes_back_from_its_file(saved: TypicalFeatures, tmp_path: Path) -> None:
    loaded = TypicalFeatures.load(tmp_path, hidden_size=12)
    assert loaded is not None
    rows = np.random.default_rng(6).normal(size=(9, 12))
    np.testing.assert_allclose(loaded.distances(rows), saved.distances(rows), rtol=1e-5)
    assert saved.distances(rows).std() > 0.05
    assert {name: (each.shape, str(each.dtype)) for name, each in load_file(tmp_path / FILE).items()} == {
        "mean": ((12,), "float32"),
        "directions": ((4, 12), "float32"),
        "variances": ((4,), "float32"),
        "rest_variance": ((1,), "float32"),
    }


def test_no_file_is_no_distance(tmp_path: Path) -> None:
    assert TypicalFeatures.load(tmp_path, hidden_size=12) is None


@pytest.mark.usefixtures("saved")
def test_a_file_that_is_not_this_models_is_refused_in_one_line(tmp_path: Path) -> None:
    def refused(**changes: np.ndarray | None) -> str:
        tensors: dict[str, np.ndarray | None] = {**load_file(tmp_path / FILE), **changes}
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        save_file({name: each for name, each in tensors.items() if each is not None}, other / FILE)
        with pytest.raises(ValueError, match="latent") as caught:
            TypicalFeatures.load(other, hidden_size=12)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("remove it and do without its alarm")
        return str(caught.value)

    with pytest.raises(ValueError, match=r"is of 12 features, this model has 13; put back"):
        TypicalFeatures.load(tmp_path, hidden_size=13)
    assert "cannot be read" in refused(mean=None)
    assert "cannot be read" in refused(rest_variance=np.ones(2, dtype=np.float32))
    assert "variances of" in refused(variances=np.ones(5, dtype=np.float32))
    assert "not above 0" in refused(variances=np.zeros(4, dtype=np.float32))
    assert "not finite" in refused(mean=np.full(12, np.nan, dtype=np.float32))
    (tmp_path / FILE).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"latent\.safetensors: cannot be read"):
        TypicalFeatures.load(tmp_path, hidden_size=12)
