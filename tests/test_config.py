import sys
from dataclasses import dataclass

import pytest

import scoresde as sd
from scoresde import config, parameterization


@dataclass(frozen=True)
class Custom(sd.VP):
    """A user's own process, named by its dotted path."""

    extra: int = 1


def test_names_are_kebab_case():
    assert {"vp", "subvp", "ve", "edm", "ddpm", "cosine", "linear"} == set(config.names(sd.sde))
    assert config.resolve("VP", sd.sde, "sde") is sd.VP
    assert config.resolve("sub-vp", sd.sde, "sde") is sd.SubVP


def test_a_dotted_path_reaches_a_users_class():
    built = config.build({"name": f"{__name__}.Custom", "extra": 3}, sd.sde, "sde")
    assert type(built).__name__ == "Custom"
    assert built.extra == 3
    with pytest.raises(sd.ConfigError, match="cannot be imported"):
        config.build({"name": "no.such.Thing"}, sd.sde, "sde")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A module that can be imported, and tells whether it was."""
    (tmp_path / "elsewhere_nets.py").write_text(
        "import scoresde as sd\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass(frozen=True)\nclass Own(sd.VP):\n    extra: int = 1\n\n\n"
        "def __getattr__(name):\n    raise SystemExit(name)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("SCORESDE_IMPORT", raising=False)
    yield "elsewhere_nets"
    sys.modules.pop("elsewhere_nets", None)


def test_a_name_alone_imports_nothing(elsewhere, monkeypatch):
    label = {"name": "time", "sde": {"name": f"{elsewhere}.Own"}}
    for section, room in (
        (f"{elsewhere}.Own", sd.sde),
        ({"name": f"{elsewhere}.Own", "extra": 3}, sd.sde),
        ({"name": "eps", "label": label}, parameterization),
    ):
        with pytest.raises(sd.ConfigError, match=f"import {elsewhere} before.*IMPORT={elsewhere}"):
            config.build(section, room, "sde")
    assert elsewhere not in sys.modules
    monkeypatch.setenv("SCORESDE_IMPORT", f"other,{elsewhere}")
    assert config.build({"name": f"{elsewhere}.Own", "extra": 3}, sd.sde, "sde").extra == 3
    monkeypatch.delenv("SCORESDE_IMPORT")
    built = config.build({"name": "eps", "label": label}, parameterization, "parameterization")
    assert built.label.sde.extra == 1
    with pytest.raises(sd.ConfigError, match="is not a dataclass"):  # not asked for what it lacks
        config.build(f"{elsewhere}.Other", sd.sde, "sde")


def test_what_a_user_types_is_imported(elsewhere, tmp_path):
    (tmp_path / "c.yaml").write_text(f"sde: {{name: {elsewhere}.Own, extra: 4}}\n")
    content = config.read_yaml(tmp_path / "c.yaml")
    assert elsewhere not in sys.modules
    content = config.read_config(tmp_path / "c.yaml")
    assert config.build(content["sde"], sd.sde, "sde").extra == 4
    sys.modules.pop(elsewhere)
    content = {}
    config.override(content, f"sde.name={elsewhere}.Own")
    assert config.build(content["sde"], sd.sde, "sde").extra == 1
    with pytest.raises(sd.ConfigError, match=r"'no\.such\.Thing' cannot be imported: No module"):
        config.override(content, "sde.name=no.such.Thing")


def test_values_are_coerced_to_the_fields_type():
    assert config.build({"name": "vp", "beta_max": "1e1"}, sd.sde, "sde").beta_max == 10.0
    with pytest.raises(sd.ConfigError, match=r"sde\.beta_max: .*valid number.*got 'high'"):
        config.build({"name": "vp", "beta_max": "high"}, sd.sde, "sde")


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"name": "vpp"}, "unknown sde 'vpp'; did you mean 'vp'"),
        ({"name": "vp", "beta_mx": 1}, r"sde\.beta_mx of VP.*did you mean 'beta_max'"),
        ({"name": "vp", "beta_min": 30}, "0 < beta_min <= beta_max"),
        ({"name": "ve", "t_min_sampling": 1e-7}, "outside the trained times"),
        ({"name": "edm", "t_min": 1}, "unknown key"),
        ({}, "sde needs a name"),
    ],
)
def test_mistakes_are_named(section, match):
    with pytest.raises(sd.ConfigError, match=match):
        config.build(section, sd.sde, "sde")


def test_objects_pass_through():
    sde = sd.VP()
    assert config.build(sde, sd.sde, "sde") is sde


def test_override_reads_yaml_and_refuses_nonsense():
    content = {}
    config.override(content, "net.multipliers=[1, 2]")
    config.override(content, "sde.beta_max=20")
    assert content == {"net": {"multipliers": [1, 2]}, "sde": {"beta_max": 20}}
    for bad, match in [
        ("beta_max=20", "section.key=value"),
        ("sde.beta_max", "section.key=value"),
        ("sdee.beta_max=1", "did you mean 'sde'"),
        ("sde.beta_max=[1", "not valid YAML"),
    ]:
        with pytest.raises(sd.ConfigError, match=match):
            config.override({}, bad)


def test_merge_replaces_a_section_of_another_class():
    base = {"sde": {"name": "vp", "beta_max": 10}, "net": {"width": 8}}
    merged = config.merge(base, {"sde": {"name": "ve"}, "net": {"blocks": 2}})
    assert merged == {"sde": {"name": "ve"}, "net": {"width": 8, "blocks": 2}}
    kept = config.merge(base, {"sde": {"name": "vp", "beta_min": 1}})
    assert kept["sde"] == {"name": "vp", "beta_max": 10, "beta_min": 1}


def test_files_that_are_no_configuration_are_named(tmp_path):
    with pytest.raises(sd.ConfigError, match="cannot read"):
        config.read_yaml(tmp_path / "none.yaml")
    for text, match in [("a: [1", "not valid YAML"), ("- 1", "mapping of sections")]:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(sd.ConfigError, match=match):
            config.read_yaml(tmp_path / "c.yaml")
    with pytest.raises(sd.ConfigError, match="unknown section 'trainning'"):
        config.check_sections({"trainning": {}})
    with pytest.raises(sd.ConfigError, match="must be a mapping"):
        config.check_sections({"sde": "vp"})
