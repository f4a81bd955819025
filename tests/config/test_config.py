"""The configuration: layers, mistakes, stage parts, documents."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from pathlib import Path

import pytest

from pipelines.config import names, sections, show
from pipelines.config.load import PROFILES, ConfigError, known_keys, load_config
from pipelines.config.names import STAGES
from pipelines.config.sections import Config
from pipelines.config.show import to_markdown, to_toml


def problems(*sets: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(sets=list(sets), **options)
    return caught.value.problems


def test_layers_override_each_other_in_order(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('profile = "quick"\nseed = 5\n[tune]\nsteps = 17\nlr = 1e-4\n')
    assert load_config(file=file).refine.steps == PROFILES["quick"]["refine.steps"] != Config().refine.steps
    assert load_config("paper", file).refine.steps == 0, "the option goes before the file's profile"
    found = load_config(file=file, sets=["tune.steps=9"], attack__enabled=False)
    assert (found.seed, found.tune.steps, found.tune.lr, found.attack.enabled) == (5, 9, 1e-4, False)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid_and_survives_its_own_file(profile: str, tmp_path: Path) -> None:
    config = load_config(profile)
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load_config(file=tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tune.stpes=3", "did you mean tune.steps?"),
        ("steps=3", "did you mean tune.steps?"),
        ("frobnicate.x=1", "frobnicate.x: unknown key"),
        ("tune.steps=-1", "tune.steps: Input should be greater than or equal to 0, got -1"),
        ("tune.lr=0.1", "tune.lr"),
        ("attack.eps=nan", "finite"),
        ("engine.device=tpu", "'auto', 'cpu' or 'cuda'"),
        ("tune.identity=mobilfacenet", "did you mean 'mobilefacenet'?"),
        ("tune.margins=0.1,0.2,0.3", "3 margins for 2 identity features"),
        ("tune.margins=0.1,2", "margins are cosines"),
        ("publish.judge=arcface", "unknown recogniser"),
        ("publish.judge=mobilefacenet", "what is used inside never judges"),
        ("refine.identity=faceres", "what is used inside never judges"),
        ("refine.jpeg_quality=90,20", "LOW <= HIGH"),
        ("fuse.layers=0,16", "layers are 0..15"),
        ("gallery.synthetic=5", "fuse.k"),
        ("tune.steps", "KEY=VALUE expected"),
    ],
)
def test_mistakes_are_named(text: str, words: str) -> None:
    (found,) = problems(text)
    assert words in found


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[tune]\nsteps = -1\n[refin]\nlr = 1\n")
    found = "\n".join(problems("attack.epsilon=1", file=tmp_path / "c.toml"))
    assert "tune.steps" in found and "refin" in found and "attack.eps?" in found
    assert "standard" in problems(profile="standrad")[0]
    (tmp_path / "bad.toml").write_text("[tune\n")
    assert "not TOML" in problems(file=tmp_path / "bad.toml")[0]
    assert "No such file" in problems(file=tmp_path / "none.toml")[0]


def test_values_from_words() -> None:
    found = load_config(
        sets=[
            "tune.identity=encoder",
            "refine.identity=mobilefacenet, encoder",
            "publish.max_ism=0.4",
            "refine.jpeg_quality=60,95",
            "attack.enabled=false",
            "engine.workers=none",
        ]
    )
    assert found.tune.identity == ("encoder",) and found.refine.identity == ("mobilefacenet", "encoder")
    assert found.publish.max_ism == 0.4 and found.refine.jpeg_quality == (60, 95) and found.attack.enabled is False
    assert (
        len(found.refine.margin_of_each()) == 2 and load_config(sets=["publish.max_ism=none"]).publish.max_ism is None
    )


def test_keys_of_stages_follow_their_own_settings_only() -> None:
    base = load_config()

    def changed(setting: str) -> list[str]:
        other = load_config(sets=[setting])
        assert other != base
        return [stage for stage in STAGES if other.canonical(stage) != base.canonical(stage)]

    assert changed("align.min_face_size=30") == ["align"]
    assert changed("invert.refine_steps=5") == ["invert"]
    assert changed("fuse.k=5") == ["fuse"]
    assert changed("tune.steps=5") == ["tune"] == changed("refine.limit=0.5")
    assert changed("inspect.tau=2") == ["attack"] == changed("attack.steps=3")
    assert changed("publish.on_fail=copy") == ["publish"]
    assert changed("strengthen.steps=5") == ["strengthen"] == changed("strengthen.looks=1")
    assert changed("mask.scale=2") == ["tune"] == changed("mask.features=0.1"), "later ones follow through its key"
    assert changed("publish.min_jod=8") == ["strengthen", "publish"]
    assert changed("publish.distortions=half") == ["strengthen", "publish"] == changed("publish.max_ism=0.3")
    assert changed("seed=1") == ["align"], "later stages follow through the key of the stage before"
    for setting in (
        "engine.workers=3",
        "engine.threads=2",
        "engine.shard_photos=5",
        "engine.align_batch=2",
        "engine.face_seconds=9",
        "engine.stop_after_errors=0",
        "engine.device=cpu",
        "engine.ray_address=auto",
        "gallery.synthetic=99",
    ):
        assert changed(setting) == [], setting


def test_sections_have_all_fields_of_the_operators_settings() -> None:
    """And are their only source of values: the operators' own have no defaults that could differ."""
    from scol_ops.attack import AttackSettings
    from scol_ops.inversion import InvertSettings
    from scol_ops.models.embedded import RECOGNISERS
    from scol_ops.refinement import RefineSettings
    from scol_ops.strengthening import StrengthenSettings
    from scol_ops.tuning import TuneSettings

    for section, kind, extra in (
        (sections.TuneConfig, TuneSettings, {"identity", "margins", "perceptual"}),
        (sections.RefineConfig, RefineSettings, {"identity", "margins"}),
        (sections.AttackConfig, AttackSettings, {"enabled"}),
        (sections.InvertConfig, InvertSettings, set()),
        (sections.StrengthenConfig, StrengthenSettings, set()),
    ):
        assert set(section.model_fields) == {f.name for f in fields(kind)} | extra
        assert all(f.default is f.default_factory is MISSING for f in fields(kind)), kind
        assert asdict(kind(**section().model_dump(exclude=extra))) == section().model_dump(exclude=extra)
    assert names.RECOGNISERS == RECOGNISERS


def test_documents_name_every_key() -> None:
    text = to_markdown()
    for key in known_keys():
        assert f"`{key}`" in text
    assert all(info.description for _, _, info in show.fields() if not isinstance(info.default, sections.Section))


def test_configuration_document_is_up_to_date() -> None:
    document = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert document.read_text(encoding="utf-8") == to_markdown(), "scol config --markdown > docs/configuration.md"


def test_the_encoder_and_the_recogniser_in_it_do_not_judge_each_other() -> None:
    others = ("tune.identity=dlib_resnet,faceres", "refine.identity=dlib_resnet,faceres", "publish.judge=mobilefacenet")
    (found,) = problems(*others, "attack.enabled=true")
    assert "part of the encoder, which attack works through" in found
    assert load_config(sets=[*others, "attack.enabled=false"]).publish.judge == "mobilefacenet"
    (found,) = problems("tune.identity=dlib_resnet,encoder", *others[1:], "attack.enabled=false")
    assert "which tune works through" in found


def test_what_is_off_is_not_in_a_stages_key() -> None:
    """Settings that came later leave the keys of runs without them as they were, so that nothing is made again."""
    plain = load_config()
    for stage, name, text in (
        ("tune", "blur", "true"),
        ("tune", "jpeg_quality", "60,95"),
        ("attack", "momentum", "0.5"),
        ("attack", "translation_sigma", "2"),
    ):
        given = load_config(sets=[f"{stage}.{name}={text}"])
        assert name not in plain.stage_config(stage)[stage] and given.stage_config(stage)[stage][name]
    face = load_config(sets=["mask.scale=1", "mask.features=1"])
    assert "mask" not in face.stage_config("tune")
    assert load_config(sets=["mask.scale=2", "mask.features=1"]).stage_config("tune")["mask"] == {"scale": 2}
    for bar in (0, 9.5):
        config = load_config(sets=[f"publish.min_jod={bar}"])
        found = [config.stage_config(stage)["publish"].get("min_jod") for stage in ("strengthen", "publish")]
        assert found == ([bar] * 2 if bar else [None] * 2)
    for off in ("refine.steps=0", "refine.steps=0 refine.chroma=1 refine.hinge=2"):
        assert load_config(sets=[*off.split(), *names.NO_LOOP]).stage_config("tune")["refine"] == {"steps": 0}
