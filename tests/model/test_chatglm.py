"""ChatGLM2 and ChatGLM3: the same numbers, the same ids and the same prompts as the originals."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import stemtune as st
from stemtune.config import Adapter, Data, Model
from stemtune.data.records import Dialogue, Message, Place
from stemtune.data.render import render
from stemtune.data.renderer import Renderer
from stemtune.errors import DataError, DiskError, ModelError
from stemtune.generate import Sampling, stop_ids, stream_reply
from stemtune.model import chatglm, chatglm_tokenizer, load
from stemtune.model.adapter import add_adapter, starting_point
from stemtune.model.load import load_tokenizer
from tests.chatglm import (
    HIDDEN,
    INNER,
    LAYERS,
    TEXTS,
    K,
    Q,
    joined_pieces_model,
    original_answer,
    original_prompt,
    pieces_model,
    pieces_of,
    reference_logits,
    write_checkpoint,
)
from tests.models import with_lora
from tests.runs import IGNORED, adapter_of, make_config, steps_of

pytest.importorskip(
    "sentencepiece", reason="no sentencepiece: pip install 'stemtune[sentencepiece]'"
)
pytestmark = IGNORED
VERSIONS = [2, 3]
IDS = torch.randint(0, 480, (60,), generator=torch.Generator().manual_seed(1))
MORE_TEXTS = [
    *TEXTS,
    "",
    " ",
    "   ",
    "\n",
    "\n\n",
    " leading",
    "   leading",
    "trailing  ",
    "\nnewline first",
    "a\n\n\nb\tc\r\nd",
    "学而时习之，不亦说乎？ 有朋自远方来",
    "a sophist eops",
    "🜁𠮷\u0301é ﬁ Ａ ① \u3000 \u00a0 ▁ ▁▁",
    "\x00\x01<0x41>",
    "aaaa aaaaaaa ==== ======= 哈哈哈哈哈",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of conversions for this file alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEMTUNE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One of each version. Read them, don't write to them."""
    folder = tmp_path_factory.mktemp("bases")
    for version in VERSIONS:
        write_checkpoint(folder / f"v{version}", version)
    return {version: folder / f"v{version}" for version in VERSIONS}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base that may be spoiled."""
    write_checkpoint(tmp_path / "base", 2)
    return tmp_path / "base"


def config(base: Path, **values: Any) -> Model:
    return Model(**{"base": str(base), "device": "cpu", "dtype": "float32", **values})


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


def tokenizer_of(base: Path) -> Any:
    return load_tokenizer(config(base))


# -- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("pickled", [False, True])
def test_logits_of_the_original(tmp_path: Path, version: int, pickled: bool) -> None:
    weights = write_checkpoint(tmp_path, version, pickled=pickled)
    model, _ = st.load_model(config(tmp_path, allow_pickled=pickled))
    assert type(model).__name__ == "GlmForCausalLM"
    expected = reference_logits(weights, IDS)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("version", "rope"), [(2, {"divide": 4.0}), (3, {"base": 40000.0})], ids=["v2", "v3"]
)
def test_a_longer_context(tmp_path: Path, version: int, rope: dict[str, float]) -> None:
    weights = write_checkpoint(tmp_path, version, rope_ratio=4)
    model, _ = st.load_model(config(tmp_path))
    expected = reference_logits(weights, IDS, **rope)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert (expected - reference_logits(weights, IDS)).abs().max() > 0.1


def test_weights_in_a_single_file(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path, 2, shards=1)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    model, _ = st.load_model(config(tmp_path))
    torch.testing.assert_close(
        logits_of(model), reference_logits(weights, IDS), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stored_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, 3, dtype=dtype)
    folder = chatglm.converted_folder(tmp_path, allow_pickled=False)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 3
    assert {t.dtype for file in files for t in load_file(file).values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_it_is_converted_once(base: Path, cache: Path) -> None:
    first = chatglm.converted_folder(base, allow_pickled=False)
    written = (first / "config.json").stat().st_mtime_ns
    assert chatglm.converted_folder(base, allow_pickled=False) == first
    assert (first / "config.json").stat().st_mtime_ns == written
    shard = next(base.glob("*-00001-*.safetensors"))
    tensors = load_file(shard)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, shard)
    assert chatglm.converted_folder(base, allow_pickled=False) != first
    assert not list(cache.glob(".*"))


def test_what_is_said_of_it_is_the_originals(
    bases: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load.hub, "fetch", lambda _, **_more: bases[3])
    wanted = Model(base="some/chatglm3", device="cpu", dtype="float32")
    load.require_base(wanted)
    model, _ = st.load_model(wanted)
    assert model.name_or_path == str(load.base_source(wanted)) != str(bases[3])
    assert load.commit_of(wanted) == bases[3].name
    assert load.hashes_of(wanted) == {}  # no links of the Hub's cache


def test_a_converted_base_can_be_kept(bases: dict[int, Path], tmp_path: Path) -> None:
    chatglm.save_converted(bases[3], tmp_path / "glm")
    model, tokenizer = st.load_model(config(tmp_path / "glm"))
    assert torch.equal(logits_of(model), logits_of(st.load_model(config(bases[3]))[0]))
    assert tokenizer("a")["input_ids"] == tokenizer_of(bases[3])("a")["input_ids"]
    with pytest.raises(ModelError, match="there already"):
        chatglm.save_converted(bases[3], tmp_path / "glm")


def test_tree_and_padded_gradients_are_equal(bases: dict[int, Path]) -> None:
    tails = ([40, 41, 42], [40, 50], [60, 61, 62, 63])
    ids = [[*range(5, 30), *tail] for tail in tails]
    tree = st.build_tree(
        [st.Sequence(np.array(i), np.array([False] * 9 + [True] * (len(i) - 9))) for i in ids]
    )
    model = with_lora(st.load_model(config(bases[2]))[0])
    found: list[tuple[Tensor, list[Tensor]]] = []
    for backend in ("segments", "padded"):
        logps = st.target_logprobs(model, tree, backend)
        model.zero_grad()
        logps.sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((logps.detach(), gradients))
    (ours, our_gradients), (padded, padded_gradients) = found
    torch.testing.assert_close(ours, padded, atol=1e-5, rtol=1e-5)
    assert len(our_gradients) == len(padded_gradients) == LAYERS * 6 * 2
    for ours, padded in zip(our_gradients, padded_gradients, strict=True):
        torch.testing.assert_close(ours, padded, atol=1e-4, rtol=1e-4)


# -- tokenizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", MORE_TEXTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_ids_of_the_original(bases: dict[int, Path], version: int, text: str) -> None:
    pieces = pieces_of(bases[version] / "tokenizer.model")
    n = pieces.get_piece_size()
    tokenizer = tokenizer_of(bases[version])
    expected = [n + 1, n + 3, *pieces.encode(text)]
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == expected
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)
    assert tokenizer.decode(expected, skip_special_tokens=True) == pieces.decode(expected[2:])


@given(some.text(some.characters(exclude_categories=["Cs"]), max_size=40))
def test_ids_of_any_text(bases: dict[int, Path], text: str) -> None:
    pieces = pieces_of(bases[3] / "tokenizer.model")
    tokenizer = tokenizer_of(bases[3])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


@given(some.text("abe nt=-哈学是\n", max_size=60))
def test_ids_of_repetitions(bases: dict[int, Path], text: str) -> None:
    pieces = pieces_of(bases[3] / "tokenizer.model")
    tokenizer = tokenizer_of(bases[3])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


@given(some.text("abe nt=-哈学是时习之\n", max_size=60))
def test_two_vocabularies_put_together(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("joined") / "tokenizer.model"
    file.write_bytes(joined_pieces_model())
    pieces = pieces_of(file)
    tokenizer = chatglm_tokenizer.build_tokenizer(file, 3)
    assert pieces.get_piece_size() > 450
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_special_ids(bases: dict[int, Path]) -> None:
    for version, base in bases.items():
        tokenizer = tokenizer_of(base)
        n = pieces_of(base / "tokenizer.model").get_piece_size()
        named = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
        roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
        assert tokenizer.convert_tokens_to_ids(named) == list(range(n, n + 5))
        assert len(tokenizer) == n + (5 if version == 2 else 9)
        if version == 3:
            assert tokenizer.convert_tokens_to_ids(roles) == list(range(n + 5, n + 9))
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 0, 2)
        folder = chatglm.converted_folder(base, allow_pickled=False)
        stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert stops == ([2] if version == 2 else [2, n + 6, n + 8])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "unigram", "vocab_size": 420}, "encoded differently"),
        ({"normalization_rule_name": "nfkc"}, "encoded differently"),
        ({"add_dummy_prefix": False}, "encoded differently"),
        ({"remove_extra_whitespaces": True}, "encoded differently"),
    ],
)
def test_another_kind_of_tokenizer(base: Path, options: dict[str, Any], why: str) -> None:
    (base / "tokenizer.model").write_bytes(pieces_model(**options))
    with pytest.raises(ModelError, match=why):
        tokenizer_of(base)


# -- prompts ------------------------------------------------------------------------------------

CONTENTS = [
    "你好",
    "What is virtue?",
    "  leading blanks",
    "\nnewline first",
    "two\n\nparagraphs\n",
    "学而时习之 不亦说乎",
    "trailing  ",
    "[Round 2]\n\n问：",
    "🜁",
]
contents = some.one_of(
    some.sampled_from(CONTENTS), some.text("ab \n学：答问", min_size=1, max_size=12)
)


def messages_of(turns: list[tuple[str, str]]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


@pytest.mark.parametrize("version", VERSIONS)
@given(system=some.none() | contents, said=some.lists(contents, min_size=2, max_size=6))
def test_prompts_and_answers_of_the_original(
    bases: dict[int, Path], version: int, system: str | None, said: list[str]
) -> None:
    pieces = pieces_of(bases[version] / "tokenizer.model")
    renderer = Renderer(tokenizer_of(bases[version]), "chat")
    turns = [("system", system)] if system is not None else []
    turns += [(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    turns = turns if turns[-1][0] == "user" else turns[:-1]
    prompt = renderer.prompt(messages_of(turns))
    assert prompt == original_prompt(version, pieces, turns)
    answer = renderer.answer(messages_of([*turns, ("assistant", said[-1])]), prompt)
    assert answer == original_answer(version, pieces, said[-1])
    assert renderer.joined == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_dialogue_that_is_trained(bases: dict[int, Path], version: int) -> None:
    pieces = pieces_of(bases[version] / "tokenizer.model")
    renderer = Renderer(tokenizer_of(bases[version]), "chat")
    turns = [("system", "Be kind."), ("user", "你好"), ("assistant", " hi"), ("user", "why?")]
    turns += [("assistant", "学而")]
    messages = tuple(messages_of(turns))
    dialogue = Dialogue(messages=messages, trained=(2, 4), kin=(), place=Place(Path("rows"), 1))
    renderer.remember([(messages[:3], ()), (messages, ())])
    found = render(dialogue, 0, renderer, Data(path="rows"))
    for sequence, turn in zip(found, (2, 4), strict=True):
        prompt = original_prompt(version, pieces, turns[:turn])
        answer = original_answer(version, pieces, turns[turn][1])
        assert sequence.input_ids.tolist() == prompt + answer
        assert sequence.is_target.tolist() == [False] * len(prompt) + [True] * len(answer)


TOOL = {"name": "weather", "description": "天气", "parameters": {"city": "<a & b>"}}


def test_tools(bases: dict[int, Path]) -> None:
    """ChatGLM3 lists them behind the system prompt; what has no form in a prompt is refused."""
    pieces = pieces_of(bases[3] / "tokenizer.model")
    second, third = (Renderer(tokenizer_of(bases[version]), "chat") for version in VERSIONS)
    asked = [Message("system", "Use these:"), Message("user", "q")]
    listed = "Use these:\n" + json.dumps([TOOL], indent=4, ensure_ascii=False)
    turns = [("system", listed), ("user", "q")]
    assert third.prompt(asked, (TOOL,)) == original_prompt(3, pieces, turns)
    called = Message("assistant", "", tool_calls=({"name": "weather", "arguments": {}},))
    for renderer, messages in ((third, asked[1:]), (second, asked), (third, [*asked, called])):
        with pytest.raises(DataError, match="refuses"):
            renderer.prompt(messages, (TOOL,))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_empty_answer(bases: dict[int, Path], version: int) -> None:
    pieces = pieces_of(bases[version] / "tokenizer.model")
    renderer = Renderer(tokenizer_of(bases[version]), "chat")
    prompt = renderer.prompt([Message("user", "a")])
    answer = renderer.answer([Message("user", "a"), Message("assistant", "")], prompt)
    assert answer == original_answer(version, pieces, "")


@pytest.mark.parametrize("version", VERSIONS)
def test_control_tokens_in_a_text_stay_text(bases: dict[int, Path], version: int) -> None:
    renderer = Renderer(tokenizer_of(bases[version]), "chat")
    plain = renderer.prompt([Message("user", "x y")])
    text = "x </s><|assistant|>[gMASK]<eop> y"
    found = renderer.prompt([Message("user", text)])
    special = set(renderer.tokenizer.all_special_ids)
    assert [i for i in found if i in special] == [i for i in plain if i in special]
    assert text in renderer.tokenizer.decode(found)


# -- whole runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_training_and_a_reply(bases: dict[int, Path], tmp_path: Path, version: int) -> None:
    run = st.train(make_config(tmp_path, bases[version], "train.num_train_epochs=3"))
    losses = [step["loss"] for step in steps_of(run.output_dir)]
    assert losses[-1] < losses[0]
    model, tokenizer = st.load_model(config(bases[version]))
    adapted = PeftModel.from_pretrained(model, str(run.adapter_dir)).eval()
    renderer = Renderer(tokenizer, "chat")
    messages = [Message("user", "What is virtue?")]
    pieces = list(
        stream_reply(adapted, renderer, messages, Sampling(temperature=0, max_new_tokens=9))
    )
    assert "".join(pieces) == "".join(pieces).lstrip()
    assert renderer.opening == (" " if version == 2 else "\n ")
    n = pieces_of(bases[version] / "tokenizer.model").get_piece_size()
    assert stop_ids(model, renderer) == ([2] if version == 2 else [2, n + 6, n + 8])


def test_check_of_pickled_weights_converts_nothing(tmp_path: Path, cache: Path) -> None:
    write_checkpoint(tmp_path / "base", 2, pickled=True)
    before = set(cache.iterdir())
    with pytest.raises(ModelError, match="pickled"):
        tokenizer_of(tmp_path / "base")
    # A file of safetensors that holds no weights of the base opens no way to the pickles.
    save_file({"a": torch.zeros(1)}, tmp_path / "base" / "other.safetensors")
    with pytest.raises(ModelError, match="no weights"):
        tokenizer_of(tmp_path / "base")
    assert set(cache.iterdir()) == before


# -- errors -------------------------------------------------------------------------------------


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", 2, pickled=True)
    for content in (pickle.dumps({"a": Canary(tmp_path / "ran")}), b"nonsense"):
        next((tmp_path / "base").glob("*-00002-*.bin")).write_bytes(content)
        with pytest.raises(ModelError, match="can't be read"):
            st.load_model(config(tmp_path / "base", allow_pickled=True))
    torch.save({"a": Canary(tmp_path / "ran")}, next((tmp_path / "base").glob("*-00002-*.bin")))
    with pytest.raises(ModelError, match="can't be read"):
        st.load_model(config(tmp_path / "base", allow_pickled=True))
    torch.save([1, 2], next((tmp_path / "base").glob("*-00002-*.bin")))
    with pytest.raises(ModelError, match="something else than tensors"):
        st.load_model(config(tmp_path / "base", allow_pickled=True))
    assert not (tmp_path / "ran").exists()


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        path = base / "config.json"
        found = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return change


def change_shard(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Callable[[Path], None]:
    def changed(base: Path) -> None:
        shard = next(base.glob("*-00002-*.safetensors"))
        save_file(change(load_file(shard)), shard)

    return changed


def cut_shard(base: Path) -> None:
    shard = next(base.glob("*-00002-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (lambda base: next(base.glob("*-00002-*")).unlink(), "missing: model-00002"),
    "damaged shard": (cut_shard, "model-00002-of-00003.safetensors can't be read"),
    "no weights": (
        lambda base: [p.unlink() for p in base.glob("*.safeten*")] and None,
        "no weights",
    ),
    "damaged index": (
        lambda base: (base / "model.safetensors.index.json").write_text("{") and None,
        "index is damaged",
    ),
    "empty index": (
        lambda base: (base / "model.safetensors.index.json").write_text("{}") and None,
        "index is damaged",
    ),
    "unknown key": (change_shard(lambda t: {**t, "prefix": torch.ones(1)}), "unknown tensor"),
    "missing key": (change_shard(lambda t: dict(list(t.items())[1:])), "not whole"),
    "wrong shape": (
        change_shard(lambda t: {k: v[:-1].clone() for k, v in t.items()}),
        "is \\[.* not \\[",
    ),
    "int8": (change_shard(lambda t: {k: v.to(torch.int8) for k, v in t.items()}), "torch.int8"),
    "quantized": (change_config(quantization_bit=4), "`quantization_bit` is 4"),
    "the first": (change_config(multi_query_group_num=None), "no `multi_query_group_num`"),
    "biases": (change_config(add_bias_linear=True), "`add_bias_linear` is True"),
    "a text for a size": (change_config(hidden_size="wide"), "makes no model"),
    "nameless": (change_config(_name_or_path="x"), "can't tell whether"),
    "small vocabulary": (change_config(padded_vocab_size=100), "the weights 100"),
    "no tokenizer": (lambda base: (base / "tokenizer.model").unlink(), "no tokenizer.model"),
    "another tokenizer": (
        lambda base: (base / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n") and None,
        "no model of SentencePiece",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_base(base: Path, cache: Path, name: str) -> None:
    spoil, said = SPOILED[name]
    spoil(base)
    before = set(cache.iterdir())
    with pytest.raises(ModelError, match=said) as found:
        st.load_model(config(base))
    assert found.value.hint and found.value.where and "\n" not in found.value.what
    assert set(cache.iterdir()) == before


def test_without_sentencepiece(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatglm_tokenizer, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="needs the package sentencepiece") as found:
        tokenizer_of(base)
    assert found.value.hint == "pip install 'stemtune[sentencepiece]'"


def test_a_full_disk(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(chatglm, "save_file", full)
    before = set(cache.iterdir())
    with pytest.raises(DiskError, match="No space left"):
        st.load_model(config(base))
    assert set(cache.iterdir()) == before


# -- which of the two ---------------------------------------------------------------------------


def test_which_of_the_two(tmp_path: Path) -> None:
    version_of = chatglm.version_of
    assert version_of(tmp_path, {"_name_or_path": "THUDM/chatglm3-6b-base"}) == 3
    assert version_of(tmp_path, {"_name_or_path": "THUDM/chatglm2-6b"}) == 2
    assert version_of(tmp_path, {"_name_or_path": "THUDM/codegeex2-6b"}) == 2
    hub = tmp_path / "models--THUDM--chatglm3-6b" / "snapshots" / "0123"
    hub.mkdir(parents=True)
    assert version_of(hub, {}) == 3
    (tmp_path / "ChatGLM2_mine").mkdir()
    assert version_of(tmp_path / "ChatGLM2_mine", {}) == 2
    code = tmp_path / "ChatGLM2_mine" / "tokenization_chatglm.py"
    code.write_text('"<|system|>", "<|user|>", "<|assistant|>"')
    assert version_of(tmp_path / "ChatGLM2_mine", {}) == 3
    code.write_text('"[MASK]"')
    assert version_of(tmp_path / "ChatGLM2_mine", {"_name_or_path": "chatglm3-6b"}) == 2
    values = {"added_tokens_decoder": {"64796": {"content": "<|assistant|>"}}}
    (tmp_path / "ChatGLM2_mine" / "tokenizer_config.json").write_text(json.dumps(values))
    assert version_of(tmp_path / "ChatGLM2_mine", {}) == 3


# -- old adapters -------------------------------------------------------------------------------

R, ALPHA = 3, 6
OLD = {
    "self_attention.query_key_value": (Q + 2 * K, HIDDEN),
    "self_attention.dense": (HIDDEN, Q),
    "mlp.dense_h_to_4h": (2 * INNER, HIDDEN),
    "mlp.dense_4h_to_h": (HIDDEN, INNER),
}


def write_old_adapter(
    folder: Path, layers: list[str], *, pickled: bool = False
) -> dict[str, Tensor]:
    """As PEFT wrote it for the original; returns what it adds to each of its weights."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    updates: dict[str, Tensor] = {}
    for number in range(LAYERS):
        for layer in layers:
            rows, columns = OLD[layer]
            name = f"transformer.encoder.layers.{number}.{layer}"
            a = torch.randn(R, columns, generator=generator) * 0.3
            b = torch.randn(rows, R, generator=generator) * 0.3
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            updates[f"{name}.weight"] = b @ a * (ALPHA / R)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "THUDM/chatglm2-6b",
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [layer.rpartition(".")[2] for layer in layers],
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return updates


@pytest.mark.parametrize("layers", [["self_attention.query_key_value"], list(OLD)], ids=len)
@pytest.mark.parametrize("pickled", [False, True])
def test_an_old_adapter(tmp_path: Path, layers: list[str], pickled: bool) -> None:
    weights = write_checkpoint(tmp_path / "base", 2)
    updates = write_old_adapter(tmp_path / "old", layers, pickled=pickled)
    merged = {key: weight + updates.get(key, 0) for key, weight in weights.items()}
    model, _ = st.load_model(config(tmp_path / "base"))
    settings = Adapter(init_from=str(tmp_path / "old"), dropout=0.0)
    adapted = add_adapter(model, settings, 0, has_reference=True)
    expected = reference_logits(merged, IDS)
    torch.testing.assert_close(logits_of(adapted.eval()), expected, atol=1e-4, rtol=1e-4)
    assert (expected - reference_logits(weights, IDS)).abs().max() > 0.1
    with starting_point(adapted):
        torch.testing.assert_close(logits_of(adapted), expected, atol=1e-4, rtol=1e-4)


def test_training_goes_on_with_an_old_adapter(bases: dict[int, Path], tmp_path: Path) -> None:
    write_old_adapter(tmp_path / "old", ["self_attention.query_key_value"])
    settings = [f"adapter.init_from={tmp_path / 'old'}", "adapter.r=3", "adapter.alpha=6"]
    settings += ["train.max_steps=1"]
    run = st.train(make_config(tmp_path / "a", bases[2], *settings))
    names = {key.split(".")[-3] for key in adapter_of(run.adapter_dir)}
    assert names == {"q_proj", "k_proj", "v_proj"}


def test_a_pickled_adapter_is_asked_for(bases: dict[int, Path], tmp_path: Path) -> None:
    write_old_adapter(tmp_path / "old", ["self_attention.query_key_value"], pickled=True)
    settings = [f"adapter.init_from={tmp_path / 'old'}", "adapter.r=3", "adapter.alpha=6"]
    settings += ["train.max_steps=1"]
    with pytest.raises(ModelError, match="pickled"):
        st.train(make_config(tmp_path / "a", bases[2], *settings))
    settings += ["model.allow_pickled=true"]
    assert st.train(make_config(tmp_path / "b", bases[2], *settings)).adapter_dir.is_dir()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key, tensor: (key, tensor[:-1].clone() if "lora_B" in key else tensor), "rows"),
        (
            lambda key, tensor: (key.replace("1.self_attention.query_key_value", "x"), tensor),
            "can't be",
        ),
    ],
)
def test_an_old_adapter_that_does_not_fit(
    bases: dict[int, Path], tmp_path: Path, change: Any, said: str
) -> None:
    write_old_adapter(tmp_path / "old", ["self_attention.query_key_value"])
    file = tmp_path / "old" / "adapter_model.safetensors"
    save_file(dict(change(key, tensor) for key, tensor in load_file(file).items()), file)
    model, _ = st.load_model(config(bases[2]))
    with pytest.raises(ModelError, match=said):
        add_adapter(model, Adapter(init_from=str(tmp_path / "old")), 0)


def test_settings_of_an_old_adapter_that_can_not_be_kept(
    bases: dict[int, Path], tmp_path: Path
) -> None:
    write_old_adapter(tmp_path / "old", ["self_attention.query_key_value"])
    path = tmp_path / "old" / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "modules_to_save": ["output_layer"]})
    )
    model, _ = st.load_model(config(bases[2]))
    with pytest.raises(ModelError, match="modules_to_save"):
        add_adapter(model, Adapter(init_from=str(tmp_path / "old")), 0)
