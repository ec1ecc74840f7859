"""Support vector machines as arrays, their calibration, and the joining of two models, against scikit-learn."""

import dataclasses
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from slideflow_ray.errors import ConfigError
from slideflow_ray.models.networks import build, headless
from slideflow_ray.models.skip import Machine, vote
from slideflow_ray.train.svm import fit_machine, fold_rows, join, joined_state, platt, repeated_folds


@pytest.fixture(scope="module")
def rows():
    """Two rings: no plane parts them. Patients shift their features, so that leaking would show."""
    rng = np.random.default_rng(0)
    n = 120
    labels = np.arange(n) % 2
    patients = np.array([f"p{i // 6}" for i in range(n)])
    labels = np.array([int(p[1:]) % 2 for p in patients])
    radius = np.where(labels, 2.2, 1.0) + 0.25 * rng.standard_normal(n)
    angle = rng.uniform(0, 7, n)
    features = np.column_stack([radius * np.cos(angle), radius * np.sin(angle), rng.standard_normal((n, 3))])
    return 50 + 7 * features, labels, patients.tolist()


@pytest.mark.parametrize("quick", [True, False])
def test_arrays_give_what_scikit_learn_gives(rows, quick):
    features, labels, patients = rows
    found = fit_machine(features, labels, patients, quick=quick)
    assert found.kernel == ("linear" if quick else "rbf")
    gamma = "scale" if quick else found.gamma
    svc = SVC(kernel=found.kernel, C=found.c, gamma=gamma, class_weight="balanced")
    plain = make_pipeline(StandardScaler(), svc).fit(features, labels)
    machine = Machine(features.shape[1], len(found.vectors)).eval()
    machine.load_state_dict({k.removeprefix("machine."): v for k, v in found.state().items()})
    with torch.inference_mode():
        logits = machine(torch.from_numpy(features).float()).double().numpy()
    margin = logits[:, 1] - logits[:, 0]
    decision = plain.decision_function(features)
    slope, offset = np.polyfit(decision, margin, 1)
    assert quick or slope > 0  # the linear machine knows nothing of rings, so its sign is chance
    np.testing.assert_allclose(margin, slope * decision + offset, atol=2e-4)


def test_the_rings_need_the_kernel_and_unseen_patients_are_told_apart(rows):
    features, labels, patients = rows
    found = fit_machine(features, labels, patients)
    assert roc_auc_score(labels, found.oof) > 0.95
    assert roc_auc_score(labels, fit_machine(features, labels, patients, quick=True).oof) < 0.7
    assert log_loss(labels, found.oof) < 0.35


def test_a_patient_is_never_predicted_by_a_machine_that_saw_them():
    """Rows of a patient are copies, and labels are drawn by patient: only leaking could tell them."""
    rng = np.random.default_rng(1)
    prints = rng.standard_normal((40, 8))
    labels = np.repeat(rng.permutation([0, 1] * 20), 4)
    patients = [f"p{i // 4}" for i in range(160)]
    features = np.repeat(prints, 4, axis=0) + 0.01 * rng.standard_normal((160, 8))
    found = fit_machine(features, labels, patients)
    assert roc_auc_score(labels, found.oof) < 0.72


def test_platt_is_scikit_learns(rows):
    features, labels, _ = rows
    svc = SVC(kernel="rbf").fit(features, labels)
    calibrated = CalibratedClassifierCV(FrozenEstimator(svc), method="sigmoid").fit(features, labels)
    a, b = platt(svc.decision_function(features), labels)
    ours = 1 / (1 + np.exp(a * svc.decision_function(features) + b))
    np.testing.assert_allclose(ours, calibrated.predict_proba(features)[:, 1], atol=1e-6)


def test_too_few_patients_are_said(rows):
    features, labels, _ = rows
    with pytest.raises(ConfigError, match="1 patients; 5 folds"):
        fit_machine(features, labels, ["a" if y else f"b{i}" for i, y in enumerate(labels)])


def test_the_rule_is_chosen_by_log_loss_of_unseen_patients():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 400)
    patients = [f"p{i // 4}" for i in range(400)]
    half = rng.random(400) < 0.5  # each model knows one half of the images, and says 0.5 of the other
    sure = np.where(labels == 1, 0.9, 0.1)
    a, b = np.where(half, sure, 0.5), np.where(half, 0.5, sure)
    found = join(a, b, labels, patients)
    assert found.helps
    assert found.losses[found.rule] == min(found.losses["vote"], found.losses["stack"])
    assert found.rule == "stack"  # margins that are 0 where a model is ignorant add up; averages do not
    assert found.losses["A"] == pytest.approx(log_loss(labels, a))
    same = join(a, a, labels, patients)
    assert same.losses["vote"] == pytest.approx(same.losses["A"])
    better = join(a, b, labels, patients, joint=np.where(labels == 1, 0.999, 0.001))
    assert better.rule == "features"


@pytest.mark.parametrize("rule", ["vote", "stack"])
def test_joined_networks_give_the_rule_that_was_fitted(rule):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 200)
    a = np.clip(0.5 + 0.3 * (labels - 0.5) + 0.2 * rng.standard_normal(200), 0.01, 0.99)
    b = np.clip(0.5 + 0.5 * (labels - 0.5) + 0.2 * rng.standard_normal(200), 0.01, 0.99)
    patients = [str(i // 3) for i in range(200)]
    found = dataclasses.replace(join(a, b, labels, patients), rule=rule)
    torch.manual_seed(0)
    arguments = {"first": "small-cnn", "second": {"backbone": "torchvision:resnet18"}, "rule": rule}
    net = build("two-models", arguments, 2).eval()
    net.load_state_dict({**net.state_dict(), **joined_state(found)})
    x = torch.rand(4, 3, 64, 64)
    with torch.inference_mode():
        pa, pb = (torch.softmax(part(x), 1)[:, 1].double().numpy() for part in (net.first, net.second))
        p = torch.softmax(net(x), 1)[:, 1].numpy()
    if rule == "vote":
        expected = found.weight * pa + (1 - found.weight) * pb
    else:
        stack = LogisticRegression(max_iter=1000).fit(np.log(np.column_stack([a / (1 - a), b / (1 - b)])), labels)
        expected = stack.predict_proba(np.log(np.column_stack([pa / (1 - pa), pb / (1 - pb)])))[:, 1]
    np.testing.assert_allclose(p, expected, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_vote_of_certain_models_is_a_number(weight):
    """Against decimals of 500 digits, where a probability of 1 - exp(-1000) is not 1."""
    margins = [(0.3, -0.7), (37.0, 36.0), (50.0, -50.0), (-800.0, -790.0), (1000.0, 900.0)]
    a, b = torch.tensor(margins, dtype=torch.float64).T
    found = vote(a, b, torch.tensor(weight))
    with localcontext(prec=500):
        w = Decimal(float(torch.tensor(weight)))
        pairs = [[1 / (1 + Decimal(-m).exp()) for m in pair] for pair in margins]
        expected = [float(((p := w * x + (1 - w) * y) / (1 - p)).ln()) for x, y in pairs]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_features_of_all_stages():
    torch.manual_seed(0)
    net = build("skip-svm", {"backbone": "torchvision:resnet18", "stages": [1, 3]}, 2).eval()
    x = torch.rand(2, 3, 64, 64)
    seen = {}
    for stage in (1, 3):
        net.features.backbone.get_submodule(f"layer{stage}").register_forward_hook(
            lambda _m, _i, out, stage=stage: seen.update({stage: out})
        )
    with torch.inference_mode():
        v = net.features(x).numpy()
    parts = []
    for stage in (1, 3):
        maps = seen[stage].numpy()
        part = np.concatenate([maps.mean((2, 3)), maps.max((2, 3))], 1)
        parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
    np.testing.assert_allclose(v, np.concatenate(parts, 1), rtol=1e-5)
    assert v.shape[1] == net.features.dim == 2 * (64 + 256)
    assert build("skip-svm", {"backbone": "torchvision:resnet50"}, 2).features.dim == 7680
    assert isinstance(headless(net, 2), torch.nn.Module)


def test_folds_repeat_and_keep_patients_together():
    labels = np.array([0, 1] * 30)
    patients = [f"p{i // 3}" for i in range(60)]
    seen = []
    for seed, fold, train, test in repeated_folds(labels, patients, 5, 2):
        assert not {patients[i] for i in train} & {patients[i] for i in test}
        seen.append((seed, fold, len(test)))
    assert len(seen) == 10
    assert sum(n for *_, n in seen) == 120


# what machines are judged by, principal components, and stages that are added


def test_rows_held_back_are_judged_by_a_machine_of_the_others(rows):
    features, labels, patients = rows
    mine = np.array([int(p[1:]) < 12 for p in patients])
    of = [p for p, here in zip(patients, mine, strict=True) if here]
    held = (features[~mine], labels[~mine], [p for p, here in zip(patients, mine, strict=True) if not here])
    found = fit_machine(features[mine], labels[mine], of, held=held)
    svc = SVC(kernel=found.kernel, C=found.c, gamma=found.gamma, class_weight="balanced")
    plain = make_pipeline(StandardScaler(), svc).fit(features[mine], labels[mine])
    np.testing.assert_allclose(found.mean, plain[0].mean_)
    assert found.auc == pytest.approx(roc_auc_score(held[1], plain.decision_function(held[0])))
    assert found.oof.shape == held[1].shape
    assert roc_auc_score(held[1], found.oof) > 0.9


def test_features_that_flatter_are_judged_by_those_of_networks_that_had_not_seen_them():
    """A network that has seen a row tells its label; of others it knows nothing."""
    rng = np.random.default_rng(4)
    labels, patients = np.arange(80) // 2 % 2, [f"p{i // 2}" for i in range(80)]
    noise = rng.standard_normal((6, 80, 3))
    seen = noise[5].copy()
    seen[:, 0] = labels + 0.01 * noise[5, :, 0]
    crossed = []
    for k, (train, _) in enumerate(fold_rows(labels, patients, 5, 0)):
        there = noise[k].copy()
        there[train, 0] = labels[train] + 0.01 * noise[k, train, 0]
        crossed.append(there)
    flattered = fit_machine(seen, labels, patients, quick=True)
    honest = fit_machine(seen, labels, patients, quick=True, crossed=crossed)
    assert roc_auc_score(labels, flattered.oof) > 0.99
    assert roc_auc_score(labels, honest.oof) < 0.75


def test_principal_components_are_scikit_learns(rows):
    features, labels, patients = rows
    found = fit_machine(features, labels, patients, components=3)
    assert found.basis.shape == (3, 5)
    svc = SVC(kernel=found.kernel, C=found.c, gamma=found.gamma, class_weight="balanced")
    plain = make_pipeline(StandardScaler(), PCA(3, svd_solver="full"), svc).fit(features, labels)
    machine = Machine(5, len(found.vectors), 3).eval()
    machine.load_state_dict({k.removeprefix("machine."): v for k, v in found.state().items()})
    with torch.inference_mode():
        logits = machine(torch.from_numpy(features).float()).double().numpy()
    decision, margin = plain.decision_function(features), logits[:, 1] - logits[:, 0]
    slope, offset = np.polyfit(decision, margin, 1)
    np.testing.assert_allclose(margin, slope * decision + offset, atol=2e-4)


@pytest.mark.parametrize("backbone", ["torchvision:resnet18", "timm:test_resnet"])
def test_stages_are_added_at_the_size_of_the_first(backbone):
    net = build("skip-svm", {"backbone": backbone, "fusion": "add"}, 2).eval()
    again = build("skip-svm", {"backbone": backbone, "fusion": "add"}, 2)
    assert torch.equal(net.features.basis3, again.features.basis3)  # fixed, whatever the seed
    x, seen = torch.rand(2, 3, 64, 64), {}
    for stage in (1, 2, 3, 4):
        net.features.backbone.get_submodule(f"layer{stage}").register_forward_hook(
            lambda _m, _i, out, stage=stage: seen.update({stage: out})
        )
    with torch.inference_mode():
        v = net.features(x).numpy()
    side = seen[1].shape[-1]
    total = 0
    for stage in (1, 2, 3, 4):
        basis = net.features.get_buffer(f"basis{stage}")[:, :, 0, 0].numpy()
        small = torch.from_numpy(np.einsum("kc,ncij->nkij", basis, seen[stage].numpy()))
        total = total + torch.nn.functional.interpolate(small, size=(side, side), mode="bilinear").numpy()
    pooled = [total.mean((2, 3)), total.max((2, 3))]
    expected = np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in pooled], 1)
    np.testing.assert_allclose(v, expected, rtol=1e-3, atol=1e-5)
    assert v.shape[1] == net.features.dim == 512


def test_only_rules_that_may_be_kept_are_kept():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 100)
    patients = [str(i // 2) for i in range(100)]
    a, b = rng.uniform(0.2, 0.8, (2, 100))
    joint = np.where(labels == 1, 0.99, 0.01)
    assert join(a, b, labels, patients, joint).rule == "features"
    assert join(a, b, labels, patients, joint, rules=["vote"]).rule == "vote"
    with pytest.raises(ConfigError, match="1 patients; 2 folds"):
        join(a, b, labels, ["a" if y else "b" for y in labels])
