"""Files that were damaged at random: each is read, or refused with an error of CSRM that says what to do."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from csrm.artefacts.manifest import GOLDEN_NAME, MANIFEST_NAME, TOKENIZER_NAME, write_manifest
from csrm.bundle.contents import BUNDLE_KIND
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.config import InputSpec, load_config
from csrm.errors import BundleError, ConfigError, CsrmError, InputError
from csrm.night.settings import ScoringConfig
from csrm.schemas import RETRIEVAL_TABLE
from csrm.spark.inputs import read_input
from tests.faults.cluster import ROOT
from tests.faults.nasty import NASTY

fuzz = settings(derandomize=True, database=None)
T = TypeVar("T")
seeds = st.integers(0, 2**32 - 1).map(random.Random)
WRONG_VALUES = [None, True, -1, 0, 1.5, 2**70, float("nan"), "", "x", [], ["x"], {}, {"x": 1}, *NASTY[:20]]


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """With a byte changed, a part cut out, the end cut off, something put in, or a part repeated."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 2, 10, 1_000]))
    return rng.choice(
        [
            content[:start] + bytes([rng.randrange(256)]) + content[start + 1 :],
            content[:start] + content[end:],
            content[:start],
            content[:start] + rng.choice(NASTY[:40]).encode() + content[start:],
            content[:end] + content[start:],
        ]
    )


def damaged_values(values: Any, rng: random.Random) -> Any:
    """JSON or YAML values, one of which is gone, wrong, or under another name."""
    values = copy.deepcopy(values)
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in list(entries)[:200]:
            places.append((value, key))
            visit(child)

    visit(values)
    parent, key = rng.choice(places)
    action = rng.choice(["drop", "replace", "replace", "rename"])
    if action == "replace" or (action == "rename" and isinstance(parent, list)):
        parent[key] = rng.choice(WRONG_VALUES)
    else:
        value = parent.pop(key)
        if action == "rename":
            parent[f"{key}x"] = value
    return values


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """Of a JSON file, its bytes or its values."""
    if rng.random() < 0.5:
        return damaged_bytes(content, rng)
    return json.dumps(damaged_values(json.loads(content), rng)).encode()


def unless_refused(where: Path, kind: type[CsrmError], read: Callable[[], T]) -> T | None:
    """What a function returns; None after an error of this kind that names the file or folder."""
    try:
        return read()
    except kind as error:
        refusal = str(error)
    assert str(where) in refusal
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT / "conf" / "demo_bundle", folder / "bundle"))


@settings(fuzz, max_examples=400)
@given(rng=seeds)
def test_a_damaged_config_is_read_or_refused(folder: Path, rng: random.Random) -> None:
    source = ROOT / "conf" / "score_catalog.yaml"
    path = folder / "config.yaml"
    if rng.random() < 0.5:
        path.write_bytes(damaged_bytes(source.read_bytes(), rng))
    else:
        path.write_text(yaml.safe_dump(damaged_values(yaml.safe_load(source.read_text()), rng)))

    unless_refused(path, ConfigError, lambda: load_config(path, ScoringConfig))


@settings(fuzz, max_examples=200)
@given(rng=seeds)
def test_a_damaged_manifest_is_refused(bundle: Path, rng: random.Random) -> None:
    source = (ROOT / "conf" / "demo_bundle" / MANIFEST_NAME).read_bytes()
    damaged = damaged_json(source, rng)
    (bundle / MANIFEST_NAME).write_bytes(damaged)

    if unless_refused(bundle, BundleError, lambda: load_bundle(bundle)):
        assert json.loads(damaged) == json.loads(source)


@settings(fuzz, max_examples=200)
@given(rng=seeds)
def test_a_bundle_that_says_something_else_of_itself_is_read_or_refused(bundle: Path, rng: random.Random) -> None:
    about = load_bundle(ROOT / "conf" / "demo_bundle").settings.model_dump(mode="json")
    write_manifest(bundle, BUNDLE_KIND, damaged_values(about, rng))

    unless_refused(bundle, BundleError, lambda: load_bundle(bundle).prompt_tokenizer())


@pytest.mark.parametrize("name", [TOKENIZER_NAME, GOLDEN_NAME])
@settings(fuzz, max_examples=50)
@given(rng=seeds)
def test_a_bundle_with_a_damaged_file_scores_as_it_did_or_is_refused(
    bundle: Path, name: str, rng: random.Random
) -> None:
    """Even where its manifest names the damaged file's digest."""
    source = (ROOT / "conf" / "demo_bundle" / name).read_bytes()
    damaged = damaged_json(source, rng)
    about = load_bundle(ROOT / "conf" / "demo_bundle").settings.model_dump(mode="json")
    (bundle / name).write_bytes(damaged)
    write_manifest(bundle, BUNDLE_KIND, about)
    try:
        scorer = unless_refused(bundle, BundleError, lambda: load_scorer(bundle, "cpu", threads=1, num_golden=None))
        assert scorer is None or scorer.digest == load_bundle(bundle).digest
    finally:
        (bundle / name).write_bytes(source)


def damaged_table(rng: random.Random) -> pa.Table:
    """A retrieval table in which one thing is not as it should be."""
    rows = {
        "market": ["kr"] * 4,
        "query_id": ["q1", "q1", "q2", "q2"],
        "rank": pa.array([1, 2, 1, 2], pa.int32()),
        "product_id": ["p1", "p2", "p1", "p2"],
        "title": ["텐트", "캠핑", "텐트", "캠핑"],
        "similarity": [1.0, 0.5, 1.0, 0.5],
        "source": ["lexical"] * 4,
    }
    name = rng.choice(list(rows))
    action = rng.choice(["drop", "rename", "null", "repeat", "replace", "retype", "empty", "same"])
    if action in ("drop", "rename"):
        column = rows.pop(name)
        if action == "rename":
            rows[rng.choice(["x", "`", "a.b", "a b", name.upper(), f" {name}", "", "標題"])] = column
    elif action == "null":
        rows[name] = pa.array([None, *list(rows[name])[1:]], getattr(rows[name], "type", None))
    elif action == "repeat":
        rows[name] = [next(iter(rows[name]))] * 4
    elif action == "replace":
        rows[name] = rng.choice(
            [[rng.choice(NASTY) for _ in range(4)], [0, -1, 2**31, 2**62], [0.5, float("nan"), float("inf"), -1e308]]
        )
    elif action == "retype":
        kinds = [pa.binary(), pa.date32(), pa.list_(pa.string()), pa.struct({"x": pa.int8()}), pa.bool_(), pa.null()]
        rows[name] = pa.nulls(4, rng.choice(kinds))
    elif action == "empty":
        return pa.table(rows).slice(0, 0)
    return pa.table(rows)


@pytest.mark.spark
@settings(fuzz, max_examples=60)
@given(rng=seeds)
def test_a_damaged_retrieval_table_is_read_or_refused(spark: SparkSession, folder: Path, rng: random.Random) -> None:
    path = folder / f"{rng.getrandbits(64)}.parquet"
    pq.write_table(damaged_table(rng), path)
    if rng.random() < 0.3:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))

    spec = InputSpec(path=str(path), format="parquet")
    rows = unless_refused(path, InputError, lambda: read_input(spark, RETRIEVAL_TABLE, spec).df.toPandas())
    if rows is not None:
        assert list(rows) == RETRIEVAL_TABLE.column_names
        assert not rows.duplicated(list(RETRIEVAL_TABLE.key)).any()
        assert rows["title"].notna().all()
