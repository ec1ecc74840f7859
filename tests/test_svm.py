"""Support vector machines as arrays, their calibration, and the joining of two models, against scikit-learn."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from slideflow_ray.errors import ConfigError
from slideflow_ray.models.networks import build, headless
from slideflow_ray.models.skip import Machine
from slideflow_ray.train.svm import fit_machine, join, joined_state, platt, repeated_folds


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
