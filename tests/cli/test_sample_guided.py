"""Guidance of ``scoresde sample``: the samples of the library, what is said, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import scoresde as sd
from scoresde import checkpoint
from scoresde.conditions import randomize
from scoresde.guidance import Autoguidance, Classifier, ClassifierFree

FAST = ["-n", "3", "--steps", "4", "--solver", "ddim", "--seed", "2", "--batch", "2"]


def build(name, classes=4, factor=1.0, sde=None):
    net = sd.nets.MLP((3,), width=16, blocks=1, num_classes=classes)
    randomize(net)
    with torch.no_grad():
        net.head[-1].weight.mul_(factor)
    model = sd.ScoreModel(net, sde or sd.VP(), sd.V(), shape=(3,), weights="ema").eval()
    model.save(name)
    return model


def judge(name="judge", classes=4):
    net = sd.nets.MLPClassifier((3,), num_classes=classes)
    randomize(net)
    classifier = sd.NoisyClassifier(net, sd.VP(), shape=(3,)).eval()
    classifier.save(name)
    return classifier


def drawn(score, labels, **settings):
    """The samples by the library, in the batches of the command."""
    y = {} if labels is None else {"y": torch.tensor(labels)}
    out = sd.sample(score, (3, 3), solver="ddim", steps=4, seed=2, **y, **settings)
    return out.x.numpy()


def sampled(run, *args):
    said = run("sample", *args, *FAST, "--out", "a.npy", "--json", "a.json")
    return np.load("a.npy"), json.loads(Path("a.json").read_text()), said.out


def test_classifier_free(run):
    model = build("m")
    plain, figures, line = sampled(run, "m", "--label", 3)
    assert np.allclose(plain, drawn(model, [3, 3, 3]), atol=1e-5)
    assert figures["guidance"] is None
    assert (figures["nfe"], figures["network_forwards"], figures["network_products"]) == (5, 5, 0)
    assert "guidance" not in line
    x, figures, line = sampled(run, "m", "--label", 3, "--cfg", 2.5)
    assert np.allclose(x, drawn(ClassifierFree(model, 2.5), [3, 3, 3]), atol=1e-5)
    assert np.abs(x - plain).max() > 0.01
    assert figures["guidance"] == {
        "name": "classifier-free", "scale": 2.5, "interval": None, "rescale": 0.0,
    }  # fmt: skip
    assert (figures["nfe"], figures["network_forwards"]) == (5, 10)
    assert "by ddim, classifier-free guidance 2.5: 5 evaluations each (10 of networks)," in line
    x, _, _ = sampled(run, "m", "--label", 3, "--cfg", 1)
    assert np.array_equal(x, plain)
    x, _, _ = sampled(run, "m", "--cfg", 2.5)  # each class in turn
    assert np.allclose(x, drawn(ClassifierFree(model, 2.5), [0, 1, 2]), atol=1e-5)


def test_the_interval_and_rescaling(run):
    model = build("m")
    options = ["--cfg", 4, "--rescale", 0.7, "--guidance-interval", "0.3,9"]
    x, figures, line = sampled(run, "m", "--label", 1, *options)
    score = ClassifierFree(model, 4.0, (0.3, 9.0), rescale=0.7)
    assert np.allclose(x, drawn(score, [1, 1, 1]), atol=1e-5)
    assert figures["guidance"]["interval"] == [0.3, 9.0]
    assert figures["guidance"]["rescale"] == 0.7
    assert 5 < figures["network_forwards"] < 10
    said = "classifier-free guidance 4 rescaled by 0.7 at noise levels 0.3 to 9: 5 evaluations"
    assert said in line
    _, figures, line = sampled(run, "m", "--cfg", 4, "--guidance-interval", "0.3,inf")
    assert figures["guidance"]["interval"] == [0.3, None]
    assert "at noise levels 0.3 to inf" in line


@pytest.mark.parametrize("classes", [None, 4])
def test_by_a_classifier(run, classes):
    model, classifier = build("m", classes), judge()
    x, figures, line = sampled(run, "m", "--label", 2, "--classifier", "judge")
    score = Classifier(model, classifier, conditional=classes is not None)
    assert np.allclose(x, drawn(score, [2, 2, 2]), atol=1e-5)
    assert figures["guidance"] == {
        "name": "classifier", "scale": 1.0, "interval": None, "classifier": "judge",
    }  # fmt: skip
    assert (figures["network_forwards"], figures["network_products"]) == (10, 5)
    assert "classifier guidance 1: 5 evaluations each (10 of networks and 5 ways back)" in line
    strong, _, _ = sampled(run, "m", "--label", 2, "--classifier", "judge",
                           "--classifier-scale", 5, "--guidance-interval", "0.1,50")  # fmt: skip
    score = Classifier(model, classifier, 5.0, (0.1, 50.0), classes is not None)
    assert np.allclose(strong, drawn(score, [2, 2, 2]), atol=1e-5)
    y = torch.tensor([2, 2, 2])
    sure = [classifier(torch.as_tensor(v), 1e-3, y).mean() for v in (strong, x)]
    assert sure[0] > sure[1]
    x, _, _ = sampled(run, "m", "--classifier", "judge")
    score = Classifier(model, classifier, conditional=classes is not None)
    assert np.allclose(x, drawn(score, [0, 1, 2]), atol=1e-5)


@pytest.mark.parametrize("classes", [None, 4])
def test_by_a_bad_version(run, classes):
    model, bad = build("m", classes), build("bad", classes, 0.5)
    labels = None if classes is None else [0, 1, 2]
    x, figures, line = sampled(run, "m", "--autoguide", "bad")
    assert np.allclose(x, drawn(Autoguidance(model, bad, 2.0), labels), atol=1e-5)
    assert figures["guidance"] == {
        "name": "autoguidance", "scale": 2.0, "interval": None, "bad": "bad",
    }  # fmt: skip
    assert ", autoguidance 2: 5 evaluations each (10 of networks)" in line
    x, _, _ = sampled(run, "m", "--autoguide", "bad", "--autoguide-scale", 1)
    assert np.allclose(x, drawn(model, labels), atol=1e-5)
    x, _, _ = sampled(run, "m", "--autoguide", "bad", "--guidance-interval", "0.1,2")
    some = Autoguidance(model, bad, 2.0, (0.1, 2.0))
    assert np.allclose(x, drawn(some, labels), atol=1e-5)
    assert np.abs(x - drawn(Autoguidance(model, bad, 2.0), labels)).max() > 1e-3


def test_a_bad_version_is_of_the_same_weights(run, monkeypatch):
    build("m")
    asked, load = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: asked.append(k) or load(*a, **k))
    run("sample", "m", "--autoguide", "m", "--weights", "raw", *FAST, "--out", "a.npy")
    assert [k["weights"] for k in asked] == ["raw", "raw"]


def test_with_densities_and_steps_of_each_sample(run):
    model = build("m")
    said = run("sample", "m", "-n", 2, "--solver", "runge-kutta", "--log-prob", "--divergence",
               "exact", "--cfg", 2, "--out", "a.npy", "--json", "a.json")  # fmt: skip
    figures = json.loads(Path("a.json").read_text())
    assert figures["network_forwards"] is None
    assert "of networks" not in said.out
    score = ClassifierFree(model, 2.0)
    out = sd.sample(score, (2, 3), solver="runge-kutta", log_prob=True, divergence="exact",
                    y=torch.tensor([0, 1]))  # fmt: skip
    assert np.allclose(np.load("a.npy"), out.x.numpy(), atol=1e-4)


def test_a_run_that_never_dropped_its_class(run):
    build("m")
    for drop, code in ((0.0, 1), (0.2, 0)):
        config = yaml.safe_load(Path("m/config.yaml").read_text())
        config["objective"] = {"name": "dsm", "drop": drop}
        Path("m/config.yaml").write_text(yaml.safe_dump(config))
        said = run("sample", "m", "--cfg", 2, *FAST, "--out", "a.npy", code=code)
        assert ("objective.drop of this run is 0" in said.err) == (drop == 0)
        run("sample", "m", "--cfg", 1, *FAST, "--out", "a.npy")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plain", "--cfg", 2], "--cfg needs a class-conditional model, and this one is not"),
        (["m", "--rescale", 0.5], "--rescale needs --cfg"),
        (["m", "--autoguide", "bad", "--rescale", 0.5], "--rescale needs --cfg"),
        (["m", "--classifier-scale", 2], "--classifier-scale needs --classifier"),
        (["m", "--autoguide-scale", 2], "--autoguide-scale needs --autoguide"),
        (["m", "--guidance-interval", "1,2"], "--guidance-interval needs --cfg, --classifier or"),
        (["m", "--cfg", 2, "--autoguide", "bad"], "--cfg and --autoguide do not go together"),
        (["m", "--cfg", 2, "--classifier", "judge"], "--cfg and --classifier do not go together"),
        (["m", "--cfg", 2, "--guidance-interval", "2,1"], "'2,1' is not of the form LOW,HIGH"),
        (["m", "--cfg", 2, "--guidance-interval", "1"], "'1' is not of the form LOW,HIGH"),
        (["m", "--cfg", 2, "--guidance-interval", "a,b"], "'a,b' is not of the form LOW,HIGH"),
        (["m", "--cfg", 2, "--rescale", 1.5], "rescale in [0, 1], got 1.5"),
        (["m", "--cfg", "nan"], "finite scale, got nan"),
        (
            ["m", "--cfg", 2, "--label", 4],
            "--label 4 is out of range: the model has classes 0 to 3",
        ),
        (["plain", "--classifier", "judge", "--label", 4], "--label 4 is out of range"),
        (["plain", "--label", 1], "--label needs a class-conditional model"),
        (["m", "--classifier", "three"], "the classifier has 3 classes, the model 4"),
        (["m", "--classifier", "bad"], "bad holds no classifier but a score model"),
        (["m", "--autoguide", "plain"], "the bad model has no classes, the model 4"),
        (["m", "--autoguide", "judge"], "judge"),
        (["m", "--autoguide", "ve"], "one process and one range: the bad score is of the process"),
        (["m", "--autoguide", "nowhere"], "no model at nowhere"),
    ],
)
def test_refusals(run, args, message):
    build("m")
    build("plain", None)
    build("bad", factor=0.5)
    build("ve", sde=sd.VE())
    judge()
    judge("three", 3)
    said = run("sample", *args, *FAST, "--out", "a.npy", code=1)
    assert message in said.err
    assert said.err.startswith("Error: ")
    assert len(said.err.strip().splitlines()) == 1
