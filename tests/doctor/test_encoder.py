"""What the doctor says of a build that searches by meaning: its encoder, and its table of vectors."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from csrm.artefacts import manifest
from csrm.commands.doctor import main
from csrm.doctor.checks import Check, checked
from csrm.doctor.cluster import check_text_vectors
from csrm.doctor.encoder import (
    CheckedBuild,
    CheckedSemantic,
    check_one_encoder,
    checks_of_encoder,
)
from csrm.embedding import load_encoder
from csrm.errors import ConfigError
from csrm.schemas import TEXT_VECTORS
from csrm.spark.tables import overwrite_table, spark_schema, table_path

ROOT = Path(__file__).parents[2]


def write_build(path: Path, **settings: object) -> Path:
    values = {"tables": str(path.parent / "tables"), "markets": {"us": "en"}, **settings}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_an_encoder_proves_itself_with_all_its_golden_texts(tiny_encoder: Path) -> None:
    checks = list(checks_of_encoder(CheckedSemantic(encoder=str(tiny_encoder)), "cpu", threads=1))

    assert [(check.name, check.verdict) for check in checks] == [("encoder", "ok"), ("embeds", "ok")]
    digest = load_encoder(tiny_encoder).digest
    assert checks[0].text.startswith(f"{digest[:12]} (")
    assert "every file whole" in checks[0].text
    assert checks[1].text == "3 golden texts have their vectors on cpu (CPUExecutionProvider)"


def test_a_damaged_encoder_fails_and_does_not_embed(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(1_000)
        file.write(b"x")

    (check,) = checks_of_encoder(CheckedSemantic(encoder=str(folder)), "cpu")

    assert (check.name, check.verdict, check.exit_code) == ("encoder", "FAILED", 2)
    assert "model.onnx has another content" in check.text


def test_an_executor_with_another_encoder_than_the_driver_fails(tiny_encoder: Path) -> None:
    (check,) = checks_of_encoder(CheckedSemantic(encoder=str(tiny_encoder)), "cpu", digest="0" * 64)
    assert (check.verdict, check.exit_code) == ("FAILED", 2)
    assert "expected digest 000" in check.text


def test_an_encoder_at_a_uri_needs_a_cache(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSRM_CACHE_DIR", str(tmp_path / "cache"))
    checks = list(checks_of_encoder(CheckedSemantic(encoder=tiny_encoder.as_uri()), "cpu", threads=1))
    assert [check.name for check in checks] == ["cache", "encoder", "embeds"]
    assert all(check.verdict != "FAILED" for check in checks)


def test_the_files_of_an_encoder_are_read_through_once(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builds = [write_build(tmp_path / f"{name}.yaml", encoder=str(tiny_encoder)) for name in ("a", "b")]
    hashed: list[str] = []
    file_digest = manifest.file_digest

    def count(path: Path) -> str:
        hashed.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(manifest, "file_digest", count)
    assert main(["--build", str(builds[0]), "--build", str(builds[1])]) == 0
    assert "2 configurations name one encoder" in capsys.readouterr().out
    assert hashed.count("model.onnx") == 1


def test_builds_with_two_encoders_are_a_doubt(
    tiny_encoder: Path, encoder_at: Callable[..., Path], tmp_path: Path
) -> None:
    other = encoder_at(tmp_path / "other", dimensions=8)
    semantic = CheckedBuild(tables="t", semantic=CheckedSemantic(encoder=str(tiny_encoder)))
    same, another = (CheckedBuild(tables="t", encoder=str(folder)) for folder in (tiny_encoder, other))

    assert checked("encoders", check_one_encoder, [semantic, same]).verdict == "ok"
    doubt = checked("encoders", check_one_encoder, [semantic, same, another])
    assert doubt.verdict == "warning"
    assert doubt.text.startswith("2 encoders: ")


@pytest.mark.spark
def test_the_table_of_vectors_says_whose_they_are(
    spark: SparkSession, tiny_encoder: Path, encoder_at: Callable[..., Path], tmp_path: Path
) -> None:
    def look(encoder: Path) -> Check:
        return checked("text_vectors", check_text_vectors, str(tmp_path), str(encoder))

    assert look(tiny_encoder).text.startswith("none yet in ")
    digest = load_encoder(tiny_encoder).digest
    rows = [(digest, kind, text, [1.0, 0.0]) for kind, text in (("query", "a"), ("passage", "a"))]
    path = table_path(str(tmp_path), TEXT_VECTORS)
    overwrite_table(spark.createDataFrame(rows, spark_schema(TEXT_VECTORS)), TEXT_VECTORS, path)
    assert look(tiny_encoder) == ("text_vectors", "ok", f"2 vectors of {digest[:12]} in {path}", 0)

    other = look(encoder_at(tmp_path / "encoder", dimensions=8))
    assert other.verdict == "warning"
    assert f"2 of {digest[:12]}: the encoder is a new one" in other.text

    spark.createDataFrame([("x",)], "other string").write.format("delta").save(
        table_path(f"{tmp_path}/b", TEXT_VECTORS)
    )
    broken = checked("text_vectors", check_text_vectors, f"{tmp_path}/b", str(tiny_encoder))
    assert (broken.verdict, broken.exit_code) == ("FAILED", 2)
    assert "it has other string. It is not overwritten" in broken.text


@pytest.mark.spark
def test_the_command_looks_at_builds_here_and_on_each_executor(
    spark: SparkSession, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    semantic = {"encoder": str(tiny_encoder), "k": 5, "min_similarity": 0.5}
    build = write_build(tmp_path / "build_candidates.yaml", semantic=semantic, products_per_query=3)
    embed = write_build(tmp_path / "embed_catalog.yaml", encoder=str(tiny_encoder), num_partitions=2)
    words = ["--build", str(build), "--build", str(embed)]

    assert main(words) == 0
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert names[-5:-1] == ["encoder", "embeds", "text_vectors", "encoders"]

    night = {"tables": str(tmp_path / "tables"), "bundle": str(ROOT / "conf" / "demo_bundle")}
    (tmp_path / "score_catalog.yaml").write_text(yaml.safe_dump(night), encoding="utf-8")
    assert main([*words, "--config", str(tmp_path / "score_catalog.yaml"), "--executors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    places = {line[34:].split()[0]: line[9:33].strip() for line in lines[:-1]}
    assert places["encoder"] == places["embeds"] != "driver"
    assert places["text_vectors"] == places["encoders"] == "driver"


def test_a_build_that_does_not_search_by_meaning_is_named(tmp_path: Path) -> None:
    build = write_build(tmp_path / "build_candidates.yaml")
    with pytest.raises(ConfigError, match=r"expected a configuration with semantic\.encoder"):
        main(["--build", str(build)])
