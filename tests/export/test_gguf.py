"""GGUF files against llama.cpp itself: what transformers says, it says; and what is refused."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from stemtune.config import Model
from stemtune.errors import ConfigError, DiskError, ModelError
from stemtune.export import gguf as exporting
from stemtune.export.gguf import export_gguf, file_name, read_run
from stemtune.model import gguf as reading
from tests.chatglm import pieces_model
from tests.cli.command import refused, stemtune_here
from tests.export.llamacpp import LlamaCpp, loaded
from tests.models import save_tiny_model, tiny_model, tiny_tokenizer, with_lora
from tests.runs import IGNORED

pytestmark = IGNORED
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
WINDOWS = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
# Families and what their configs may hold; each name says what is special.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3, untied, biased, wide heads": (
        "llama",
        {
            "rope_parameters": LLAMA3,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 16,
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2, biased": ("qwen2", {"use_sliding_window": False}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": YARN}),
    "gemma2, capped": ("gemma2", {"attn_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3",
        {"num_hidden_layers": 7, "layer_types": WINDOWS, "rope_parameters": GEMMA3_ROPE},
    ),
    "phi3, fused": ("phi3", {}),
}
PROMPTS = [
    "What is virtue?",
    "To be, or not to be",
    "学而时习之 不亦说乎",
    "Alas, poor Yorick!\n\nI knew him",
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
]
TEXTS = [
    "To be, or not to be: that is the question.",
    "  two blanks,\ttabs\t\tand \n\n\n line breaks \r\n at the end   ",
    "它是什么？有朋自远方来，不亦乐乎。",
    "Emoji 🦉👩‍👩‍👧 and ﷽ and e\u0301",
    "It's 1234567 o'clock; they'LL be 3.14 metres away...",
    "def f(x):\n    return x**2  # <b>",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|im_end|> <|im_end|>",
    "ÀÉÎõü straße ПРИВЕТ мир",
    "So <think>hm</think> yes",
]
CONVERSATIONS = [
    [("user", "What is virtue?")],
    [("system", 'You are Socrates.\n\nSpeak "plainly".'), ("user", "  Who? ")],
    [("user", "Who?"), ("assistant", "I."), ("user", "Why?\n")],
    [("system", "s"), ("user", "你好"), ("assistant", "🦉"), ("user", "{{ x }}")],
]


def write_run(folder: Path, base: Path, *, template: str = "chat", **lora: Any) -> Path:
    """An adapter of random numbers as a run saves one: far from nothing, and without training."""
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with_lora(source, **lora).save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "adapter")
    model = Model(base=str(base), dtype="float32", device="cpu")
    prompt = {"model": model.model_dump(), "system": "You are Socrates.", "template": template}
    (folder / "adapter" / "stemtune.json").write_text(json.dumps(prompt))
    return folder


def without_effect(run: Path, folder: Path) -> Path:
    """The run with an adapter that adds nothing: merged, it is the base."""
    (folder / "adapter").mkdir(parents=True)
    for path in (run / "adapter").iterdir():
        (folder / "adapter" / path.name).write_bytes(path.read_bytes())
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = {n: t * 0 if "lora_B" in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def exported(run: Path, kind: str = "f32", *, adapter_only: bool = False) -> Path:
    read = read_run(run)
    target = run / file_name(read, kind, adapter_only=adapter_only)
    export_gguf(read, target, kind, adapter_only=adapter_only)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    return target


class Expected:
    """What transformers and PEFT say."""

    def __init__(self, run: Path, base: Path) -> None:
        source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model: Any = PeftModel.from_pretrained(source, str(run / "adapter")).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Of what follows each of them."""
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    def prompt(self, turns: list[tuple[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            as_messages(turns), tokenize=False, add_generation_prompt=True
        )


def as_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def says_the_same(model: LlamaCpp, expected: Expected) -> None:
    gemma = expected.model.config.model_type.startswith("gemma")
    near = 1e-2 if gemma else 1e-3  # llama.cpp looks GELU up in a table in 16 bits
    for prompt in PROMPTS:
        ids = expected.ids(prompt)
        found = model.greedy(ids, 32)
        # A token that transformers finds likeliest behind the same ones, 32 times: its own choice.
        wanted = expected.logprobs(ids + found)
        likely = model.logprobs(ids, 10).items()
        first = wanted[len(ids) - 1]
        assert max(abs(logprob - float(first[token])) for token, logprob in likely) < near
        wanted[:, expected.tokenizer.eos_token_id] = -torch.inf
        assert len(found) == 32 and found == wanted[len(ids) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_says_what_transformers_says(tmp_path: Path, case: str) -> None:
    """Merged, and the adapter on its base: 32 tokens of 5 prompts, and not the same all along."""
    family, changes = CASES[case]
    base = tmp_path / "base"
    save_tiny_model(base, family, **{"tie_word_embeddings": True, **changes})
    run = write_run(tmp_path / "run", base)
    expected = Expected(run, base)
    with loaded(exported(run)) as model:
        says_the_same(model, expected)
        said = {token for prompt in PROMPTS for token in model.greedy(expected.ids(prompt), 32)}
        assert len(said) > 5
    plain = exported(without_effect(run, tmp_path / "plain"))
    adapter = exported(run, adapter_only=True)
    with loaded(plain, adapter) as model:
        says_the_same(model, expected)
    with loaded(plain) as model, pytest.raises(AssertionError):
        says_the_same(model, expected)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a tiny Llama whose rows are as long as Q8_0 wants them. Read it."""
    folder = tmp_path_factory.mktemp("gguf")
    save_tiny_model(folder / "base", hidden_size=64, intermediate_size=96)
    return write_run(folder / "run", folder / "base")


def test_texts_become_the_same_tokens(tiny_run: Path) -> None:
    expected = Expected(tiny_run, tiny_run.parent / "base")
    with loaded(exported(tiny_run, "q8_0")) as model:
        for text in TEXTS:
            assert model.ids(text) == expected.ids(text)
            apart = expected.tokenizer(text, split_special_tokens=True)["input_ids"]
            assert model.ids(text, special=False) == apart
        for turns in CONVERSATIONS:
            assert model.prompt(as_messages(turns)) == expected.prompt(turns)


@pytest.mark.parametrize(("kind", "near"), [("f16", 0.05), ("bf16", 0.3), ("q8_0", 0.6)])
def test_fewer_bits_say_nearly_the_same(
    tiny_run: Path, tmp_path: Path, kind: str, near: float
) -> None:
    expected = Expected(tiny_run, tiny_run.parent / "base")
    ids = expected.ids(PROMPTS[0])
    wanted = expected.logprobs(ids)[-1]
    target = tmp_path / "x.gguf"
    export_gguf(read_run(tiny_run), target, kind)
    with loaded(target) as model:
        found = model.logprobs(ids, 20)
    errors = [abs(logprob - float(wanted[token])) for token, logprob in found.items()]
    assert len(errors) == 20 and 0 < max(errors) < near
    adapter = tmp_path / "x-lora.gguf"
    export_gguf(read_run(tiny_run), adapter, kind, adapter_only=True)
    tensors = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(target).tensors}
    assert tensors["blk.0.attn_q.weight"] == tensors["token_embd.weight"] == kind.upper()
    assert tensors["blk.0.attn_norm.weight"] == tensors["output_norm.weight"] == "F32"


def test_rank_stabilised_scale_is_written_in(tmp_path: Path, tiny_run: Path) -> None:
    base = tiny_run.parent / "base"
    run = write_run(tmp_path / "run", base, use_rslora=True, r=4, lora_alpha=3)
    adapter = exported(run, adapter_only=True)
    field = GGUFReader(adapter).fields["adapter.lora.alpha"]
    assert field.contents() == pytest.approx(3 / 4**0.5 * 4)
    with loaded(exported(without_effect(run, tmp_path / "plain")), adapter) as model:
        says_the_same(model, Expected(run, base))


def test_what_the_file_says_of_itself(tiny_run: Path, tmp_path: Path) -> None:
    export_gguf(read_run(tiny_run), tmp_path / "x.gguf", "bf16")
    reader = GGUFReader(tmp_path / "x.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "adapter")
    end = tokenizer.eos_token_id
    assert {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "base-run",
        "general.file_type": 32,
        "llama.block_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.eot_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }.items() <= values.items()
    kinds = values["tokenizer.ggml.token_type"]
    assert [i for i, kind in enumerate(kinds) if kind == 3] == sorted(tokenizer.all_special_ids)
    rows = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert rows["token_embd.weight"] == [64, len(tokenizer)] == [64, len(kinds)]
    assert file_name(read_run(tiny_run), "q8_0") == "base-run-Q8_0.gguf"
    assert file_name(read_run(tiny_run), "f16", adapter_only=True) == "base-run-F16-LoRA.gguf"


def test_weights_in_llama_cpp_s_order_are_transformers_own(tiny_run: Path, tmp_path: Path) -> None:
    """The reader of transformers, which turns the rows back, finds what PEFT merges."""
    export_gguf(read_run(tiny_run), tmp_path / "x.gguf", "f32")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    merged = Expected(tiny_run, tiny_run.parent / "base").model.merge_and_unload()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, atol=1e-6, rtol=1e-5)


# -- tokenizers -------------------------------------------------------------------------------

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# As they stand in the `tokenizer.json` of Llama 3 and Qwen2.
LLAMA3_CUT = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_CUT = LLAMA3_CUT.replace("{1,3}", "")


def byte_level(cut: str, **model: Any) -> dict[str, Any]:
    """The tests' tokenizer with another way of cutting, as `tokenizer.json` has it."""
    spec = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    first = {"type": "Digits", "individual_digits": True}
    if cut != "digits":
        first = {
            "type": "Split",
            "pattern": {"Regex": cut},
            "behavior": "Isolated",
            "invert": False,
        }
    parts = [first, {**level, "use_regex": cut == "digits"}]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    spec["model"] |= model
    return spec


def pieces(**changes: Any) -> dict[str, Any]:
    """SentencePiece's merges with bytes for what they lack, as Llama 2 and Gemma have them."""
    model = pieces_model(bos_id=1, eos_id=2, unk_id=0)
    with TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model)
        (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return json.loads(tokenizer.backend_tokenizer.to_str()) | changes


def save_tokenizer(spec: dict[str, Any], folder: Path, bos: str | None = None) -> None:
    """With a template in the manner of Llama: the first token, and turns between special tokens."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), clean_up_tokenization_spaces=False
    )
    greedy = any(token["content"] == "</s>" and token["rstrip"] for token in spec["added_tokens"])
    for text, special in (("<|turn|>", True), ("<|over|>", True), ("<think>", False)):
        token = AddedToken(text, special=special, rstrip=greedy, normalized=False)
        fast.add_tokens([token], special_tokens=special)
    fast.eos_token = "<|over|>"
    if bos:
        fast.bos_token = bos
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|over|>"
        "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)


def phi3() -> dict[str, Any]:
    """Special tokens that swallow the blanks behind them, all but three."""
    spec = pieces(normalizer=LEGACY, pre_tokenizer=None)
    last = {**spec["added_tokens"][0], "id": len(spec["model"]["vocab"])}
    spec["added_tokens"].append({**last, "content": "<|endoftext|>"})
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "</s>"
    return spec


NEVER = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LEGACY = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
TOKENIZERS = {
    "smollm": lambda: byte_level("digits"),
    "llama-bpe": lambda: byte_level(LLAMA3_CUT, ignore_merges=True),
    "smaug-bpe": lambda: byte_level(LLAMA3_CUT),
    "qwen2": lambda: byte_level(QWEN2_CUT),
    "default (a blank before each text)": lambda: pieces(normalizer=LEGACY, pre_tokenizer=None),
    "default (a blank before the first)": pieces,
    "default (no blank)": lambda: pieces(normalizer=None, pre_tokenizer=NEVER),
    "default (as Phi-3)": phi3,
    "default (as Gemma)": lambda: pieces(normalizer=REPLACE, pre_tokenizer=None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_other_tokenizers(tmp_path: Path, name: str) -> None:
    """Prompts become the same tokens, whatever is in the turns."""
    spec = TOKENIZERS[name]()
    base = tmp_path / "base"
    bos = "<s>" if "default" in name else "<|im_start|>"
    save_tokenizer(spec, base, bos)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    rows = len(tokenizer) + 3  # more than there are tokens, as many bases have
    tiny_model("llama", vocab_size=rows).save_pretrained(base)
    run = write_run(tmp_path / "phi3", base)  # a name that llama.cpp would read something out of
    file = exported(run)
    values = {n: field.contents() for n, field in GGUFReader(file).fields.items()}
    assert values["tokenizer.ggml.pre"] == name.partition(" ")[0]
    with loaded(file) as model:
        for text in TEXTS:
            turns = [("user", text), ("assistant", text.upper()), ("user", text)]
            wanted = tokenizer.apply_chat_template(
                as_messages(turns), add_generation_prompt=True, return_dict=False
            )
            prompt = model.prompt(as_messages(turns))
            assert model.ids(prompt, begin=True) == wanted


def test_a_text_alone(tmp_path: Path, tiny_run: Path) -> None:
    """`data.template: plain` prompts by the last text, and so does the file."""
    run = write_run(tmp_path / "run", tiny_run.parent / "base", template="plain")
    with loaded(exported(run)) as model:
        for turns in CONVERSATIONS:
            assert model.prompt(as_messages(turns)) == turns[-1][1]


# -- refused ----------------------------------------------------------------------------------


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "adapter"]


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, r"layers were trained whole \(lm_head\)"),
    ],
)
def test_an_adapter_that_llama_cpp_takes_only_merged(
    tmp_path: Path, lora: dict[str, Any], said: str
) -> None:
    save_tiny_model(tmp_path / "base", tie_word_embeddings=False)
    run = write_run(tmp_path / "run", tmp_path / "base", **lora)
    with pytest.raises(ModelError, match=said) as found:
        exported(run, adapter_only=True)
    assert "leave --adapter-only out" in found.value.hint and not left_behind(run)
    expected = Expected(run, tmp_path / "base")
    with loaded(exported(run)) as model:
        says_the_same(model, expected)


def test_loftq_is_refused_alone(tmp_path: Path, tiny_run: Path) -> None:
    run = write_run(tmp_path / "run", tiny_run.parent / "base")
    file = run / "adapter" / "stemtune.json"
    prompt = {**json.loads(file.read_text()), "adapter": {"init_weights": "loftq"}}
    file.write_text(json.dumps(prompt))
    with pytest.raises(ModelError, match="as LoftQ rounded it"):
        exported(run, adapter_only=True)
    assert not left_behind(run)


BASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("olmo2", {}, "no GGUF of a olmo2 base"),
    "rope": (
        "llama",
        {"rope_parameters": {**YARN, "rope_type": "dynamic"}},
        "RoPE of type dynamic",
    ),
    "yarn": ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 8}}, "YaRN with beta_fast"),
    "activation": ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    "windows": ("gemma2", {"layer_types": ["full_attention"] * 2}, "windows in other blocks"),
    "scale": ("gemma2", {"query_pre_attn_scalar": 7}, "scores scaled by 7"),
    "bias": ("qwen3", {"attention_bias": True}, "has no model.layers.0.self_attn.k_proj.bias"),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_llama_cpp_would_compute_otherwise(tmp_path: Path, name: str) -> None:
    family, changes, said = BASES[name]
    save_tiny_model(tmp_path / "base", family, **changes)
    run = write_run(tmp_path / "run", tmp_path / "base")
    with pytest.raises(ModelError, match=said) as found:
        exported(run)
    assert "stemtune merge" in found.value.hint and not left_behind(run)


def test_windows_that_llama_cpp_has_not_end_the_context(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model(tmp_path / "base", "mistral", sliding_window=40)
    file = exported(write_run(tmp_path / "run", tmp_path / "base"))
    assert GGUFReader(file).fields["llama.context_length"].contents() == 40
    assert "the context ends where one would, at 40" in caplog.text


def odd_tokenizers() -> dict[str, tuple[dict[str, Any], str]]:
    greedy = byte_level(QWEN2_CUT)
    greedy["added_tokens"][0]["rstrip"] = True
    lower = byte_level(QWEN2_CUT) | {"normalizer": {"type": "Lowercase"}}
    split = {**NEVER, "split": True}
    holes = pieces()
    del holes["model"]["vocab"]["<0x41>"]
    return {
        "cut": (byte_level(r"\p{L}+|."), "no name for how this tokenizer cuts"),
        "digits of four": (byte_level(LLAMA3_CUT.replace("3}", "4}")), "no name for how"),
        "merges ignored": (byte_level(QWEN2_CUT, ignore_merges=True), "no name for how"),
        "blanks": (greedy, r"llama\.cpp keeps the blanks around '<\|im_start\|>'"),
        "normalizer": (lower, "a normalizer of type Lowercase"),
        "pieces in words": (pieces(pre_tokenizer=split), "no such rule"),
        "bytes": (holes, "no tokens for all bytes"),
    }


@pytest.mark.parametrize("name", list(odd_tokenizers()))
def test_a_tokenizer_that_llama_cpp_has_not(tmp_path: Path, name: str) -> None:
    spec, said = odd_tokenizers()[name]
    save_tokenizer(spec, tmp_path / "base")
    rows = len(AutoTokenizer.from_pretrained(tmp_path / "base")) + 1
    tiny_model("llama", vocab_size=rows).save_pretrained(tmp_path / "base")
    run = write_run(tmp_path / "run", tmp_path / "base")
    with pytest.raises(ModelError, match=said):
        exported(run)
    assert not left_behind(run)
    assert exported(run, adapter_only=True).is_file()


def test_nothing_is_written_over(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="it is there already"):
        export_gguf(read_run(tiny_run), tmp_path / "x.gguf", "f32")
    with pytest.raises(ConfigError, match="no name of a GGUF file"):
        export_gguf(read_run(tiny_run), tmp_path / "x.bin", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_nothing_is_left_behind(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was interrupted, wherever that was."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "quantize", interrupt)
    for adapter_only in (False, True):
        with pytest.raises(KeyboardInterrupt):
            export_gguf(read_run(tiny_run), tmp_path / "x.gguf", "f32", adapter_only=adapter_only)
        assert not list(tmp_path.iterdir())


def test_memories_stay_behind(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run", tiny_run.parent / "base")
    file = run / "adapter" / "stemtune.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "memories": {"count": 3}}))
    exported(run)
    assert "it answers without its memories" in caplog.text


@pytest.mark.parametrize("verb", ["gguf", "ollama"])
def test_without_the_package(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "find_spec", lambda _: None)
    outcome = stemtune_here("export", verb, "run", cwd=tmp_path)
    refused(outcome, 3, "a GGUF file needs the package gguf", "export")
    assert "pip install 'stemtune[gguf]'" in outcome.err


def test_no_room(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="can't write it"):
        export_gguf(read_run(tiny_run), tmp_path / "file" / "x.gguf", "f32")
