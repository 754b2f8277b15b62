"""Bundles that fail on marked texts: the real graph and tokenizer of a bundle, with faults built into them."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from csrm.artefacts.manifest import GOLDEN_NAME, MANIFEST_NAME, MODEL_NAME, TOKENIZER_NAME, write_manifest
from csrm.bundle.contents import BUNDLE_KIND
from csrm.bundle.golden import GoldenPairs
from csrm.bundle.loading import load_bundle

ERROR_MARK, NAN_MARK, NAN_PACK_MARK, HANG_MARK, TOKENIZER_MARK = "Ж", "Ա", "א", "Ω", "ܐ"
"""Letters of two bytes of alphabets that no other text of these tests uses; the first byte is a token of its own."""


def faulty_bundle(source: Path, folder: Path, longest_pack: int | None = None) -> Path:
    """A bundle that scores as another one does, but for prompts with a mark.

    ERROR_MARK: a node of the graph raises. NAN_MARK: the marked pair's logits are NaN. NAN_PACK_MARK: those of all
    pairs in its pack. HANG_MARK: the graph does not come back. TOKENIZER_MARK: the tokenizer raises.

    Args:
        source: a bundle.
        folder: of the new one.
        longest_pack: packs of more tokens raise, as where memory runs out.
    """
    shutil.copytree(source, folder)
    bundle = load_bundle(source)
    tokenizer = bundle.prompt_tokenizer()
    first = {mark: tokenizer._encode(mark)[-2] for mark in (ERROR_MARK, NAN_MARK, NAN_PACK_MARK, HANG_MARK)}
    model = onnx.load(folder / MODEL_NAME)
    _add_faults(model.graph, first, longest_pack)
    onnx.checker.check_model(model)
    onnx.save(model, folder / MODEL_NAME)
    _forget_byte(folder / TOKENIZER_NAME, TOKENIZER_MARK.encode()[0])
    write_manifest(folder, BUNDLE_KIND, bundle.settings.model_dump(mode="json"))
    return folder


def give_one_score(folder: Path) -> None:
    """Make the logits of a bundle's graph zeros for all pairs, with golden pairs that say so."""
    model = onnx.load(folder / MODEL_NAME)
    last = model.graph.node[_producer(model.graph)]
    last.output[:] = ["sound_logits" if name == "logits" else name for name in last.output]
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, dtype=np.float32), "nothing"))
    model.graph.node.append(helper.make_node("Mul", ["sound_logits", "nothing"], ["logits"]))
    onnx.save(model, folder / MODEL_NAME)
    about = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["about"]
    golden = GoldenPairs.read(folder / GOLDEN_NAME)
    scores = np.full(len(golden), np.mean([label["gain"] for label in about["labels"]]))
    GoldenPairs("torch", golden.pairs, golden.prompt_ids, scores).write(folder / GOLDEN_NAME)
    write_manifest(folder, BUNDLE_KIND, about)


def _add_faults(graph: onnx.GraphProto, first: dict[str, int], longest_pack: int | None) -> None:
    """Put nodes between the graph's last one and its output."""
    graph.node[-1 if "logits" in graph.node[-1].output else _producer(graph)].output[0] = "sound_logits"
    constants: dict[str, np.ndarray] = {
        "zero": np.array(0, dtype=np.int64),
        "nan": np.array(np.nan, dtype=np.float32),
        "row": np.zeros(1, dtype=np.int64),
        "forever": np.array(2**62, dtype=np.int64),
        "true": np.array(True),
        "longest_pack": np.array([longest_pack or 2**31], dtype=np.int64),
        "axis_1": np.array([1], dtype=np.int64),
        "marks_error": np.array(first[ERROR_MARK], dtype=np.int64),
        "marks_nan": np.array(first[NAN_MARK], dtype=np.int64),
        "marks_nan_pack": np.array(first[NAN_PACK_MARK], dtype=np.int64),
        "marks_hang": np.array(first[HANG_MARK], dtype=np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, f"fault/{name}") for name, value in constants.items())

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        graph.node.append(helper.make_node(op, inputs, [f"fault/{output}"], name=f"fault/{output}", **attributes))
        return f"fault/{output}"

    def is_in_pack(mark: str) -> str:
        """int64 scalar: 1 where a mark is among the tokens."""
        equal = add("Equal", ["input_ids", f"fault/marks_{mark}"], f"is_{mark}")
        number = add("Cast", [equal], f"is_{mark}_number", to=TensorProto.INT64)
        return add("ReduceMax", [number], f"has_{mark}", keepdims=0)

    # An index that is out of range where there is a mark, or the pack is too long.
    shape = add("Shape", ["input_ids"], "shape")
    too_long = add("Cast", [add("Greater", [shape, "fault/longest_pack"], "too_long")], "is_long", to=TensorProto.INT64)
    index = add("Max", [is_in_pack("error"), too_long], "index")
    raised = add("Gather", ["fault/row", index], "raised", axis=0)
    # A loop that turns for ever where there is a mark.
    turns = add("Mul", [is_in_pack("hang"), "fault/forever"], "turns")
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["still_going"]),
            helper.make_node("Add", ["count", "turn"], ["next_count"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("count", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("still_going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_count", TensorProto.INT64, []),
        ],
    )
    looped = add("Loop", [turns, "fault/true", "fault/zero"], "looped", body=body)
    # NaN for a whole pack, and for pairs whose product has the mark.
    pack_is_nan = add("Greater", [is_in_pack("nan_pack"), "fault/zero"], "pack_is_nan")
    is_marked = add("Equal", ["input_ids", "fault/marks_nan"], "is_nan_token")
    is_marked = add("Gather", [is_marked, "product_index"], "is_nan_token_of_product")
    is_token = add("GreaterOrEqual", ["product_index", "fault/zero"], "is_token_of_product")
    count = add("Cast", [add("And", [is_marked, is_token], "nan_token")], "nan_count", to=TensorProto.INT64)
    count = add("ReduceMax", [count, "fault/axis_1"], "pair_has_nan", keepdims=1)
    pair_is_nan = add("Greater", [count, "fault/zero"], "pair_is_nan")
    is_nan = add("Or", [pair_is_nan, pack_is_nan], "is_nan")
    # Both results are zero; adding them keeps the nodes.
    zeros = add("Add", [raised, looped], "zeros")
    zeros = add("Cast", [add("Mul", [zeros, "fault/zero"], "no_zeros")], "zeros_float", to=TensorProto.FLOAT)
    sound = add("Add", ["sound_logits", zeros], "sound")
    graph.node.append(helper.make_node("Where", [is_nan, "fault/nan", sound], ["logits"], name="fault/logits"))


def _producer(graph: onnx.GraphProto) -> int:
    return next(place for place, node in enumerate(graph.node) if "logits" in node.output)


def _forget_byte(path: Path, byte: int) -> None:
    """Take a byte out of the vocabulary of a byte-level BPE that names an unknown token which is not there either."""
    values = json.loads(path.read_text(encoding="utf-8"))
    letter = chr(byte)  # bytes 0xAE to 0xFF stand for themselves
    model = values["model"]
    model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if letter not in token}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    model["merges"] = [pair for pair in pairs if letter not in "".join(pair)]
    model["unk_token"] = "<no such token>"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
