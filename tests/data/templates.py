"""Chat templates of model families, written down as what they make of a conversation.

They are ours, not copies: shorter, but they put the same characters in the same places for the
conversations of these tests. Each has the special tokens that its family has, and its end token.
"""

from copy import deepcopy
from dataclasses import dataclass

from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.models import tiny_tokenizer

# What both of Qwen3's begin with; CLOSING stands behind the tools.
QWEN_HEAD = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>CLOSING<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
"""
# Thinks in the last turns alone: what it thought before the last question is forgotten. Its tools
# stand in the system prompt.
QWEN3 = (
    QWEN_HEAD.replace("CLOSING", "")
    + """\
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if m.reasoning_content and loop.index0 > ns.last %}
            {{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)

# Qwen3 as it ships: what an answer thinks may stand in its text, the last answer thinks even where
# it thinks nothing, results of tools that follow each other are one turn.
QWEN3_HYBRID = (
    QWEN_HEAD.replace("CLOSING", "\\nCall one in <tool_call></tool_call>")
    + """\
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set said, thought = m.content, '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('\\n') %}
            {%- set thought = thought.split('<think>')[-1].lstrip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
        {%- else %}
            {{- said }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- if said or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)

CHATML = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Trims every text; the tokenizer's end token is not the one that ends a turn.
LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {{- m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL_ALTERNATES = """
{%- set told = messages[0].content if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if told else messages %}
{%- for m in turns %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
{%- endfor %}
{{- bos_token }}"""

# The system prompt stands in the last message, if that is the user's: in no history.
MISTRAL = (
    MISTRAL_ALTERNATES
    + """
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (told + '\\n\\n' if told and loop.last else '') + m.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)

# The system prompt stands in the first turn; what surrounds a question is no token of its own.
MISTRAL_V1 = (
    MISTRAL_ALTERNATES
    + """
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {{- ' [INST] ' + (told + '\\n\\n' if told and loop.first else '') }}
        {{- m.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)

# The assistant is called model; the first one takes no system prompt, the third writes it into the
# first of the user's turns.
GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""
GEMMA3 = """
{{- bos_token }}
{%- set told = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if told else messages) %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- (told if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

# A conversation that is over ends with the tokenizer's end token as well, behind its last turn.
PHI = """
{%- for m in messages %}
    {{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}
"""

# Nothing ends a turn but the next one's role; the line break behind a role is the answer's.
GLM4 = """
{{- '[gMASK]<sop>' }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}{{- '<|observation|>\\n' + m.content }}
    {%- elif m.role == 'system' %}{{- '<|system|>\\n' + m.content }}
    {%- elif m.role == 'assistant' %}{{- '<|assistant|>\\n' + m.content }}
    {%- else %}{{- '<|user|>\\n' + m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""


@dataclass(frozen=True)
class Family:
    """A template and its special tokens.

    Attributes:
        end: which of them ends a turn; where none does, what is trained as the end.
        eos: what the tokenizer calls its end token, where that is another.
        begin: what every text begins with: the template writes it, and the tokenizer by itself
            before a text without a template. A single one is the tokenizer's `bos_token`.
        words: tokens of the vocabulary that are not special.
    """

    template: str
    special: tuple[str, ...]
    end: str
    eos: str = ""
    begin: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
THINK = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)

FAMILIES = {
    "chatml": Family(CHATML, IM, "<|im_end|>"),
    "qwen3": Family(QWEN3, IM, "<|im_end|>"),
    "qwen3_hybrid": Family(QWEN3_HYBRID, (*IM, "<|endoftext|>"), "<|im_end|>", words=THINK),
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", *HEADERS, "<|eot_id|>"),
        "<|eot_id|>",
        eos="<|end_of_text|>",
        begin=("<|begin_of_text|>",),
    ),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", begin=("<s>",)),
    "mistral_v1": Family(MISTRAL_V1, ("<s>", "</s>"), "</s>", begin=("<s>",)),
    "gemma": Family(
        GEMMA, ("<bos>", "<eos>", *TURNS), "<end_of_turn>", eos="<eos>", begin=("<bos>",)
    ),
    "gemma3": Family(
        GEMMA3, ("<bos>", "<eos>", *TURNS), "<end_of_turn>", eos="<eos>", begin=("<bos>",)
    ),
    "phi": Family(PHI, (*ROLES, "<|end|>", "<|endoftext|>"), "<|end|>", eos="<|endoftext|>"),
    "glm4": Family(
        GLM4,
        ("<|endoftext|>", "[gMASK]", "<sop>", *ROLES, "<|observation|>"),
        "<|endoftext|>",
        begin=("[gMASK]", "<sop>"),
    ),
}


def tokenizer_of(
    family: str, base: PreTrainedTokenizerBase | None = None, listed: bool = True
) -> PreTrainedTokenizerFast:
    """The tests' tokenizer, or a copy of another, with a family's special tokens and template.

    Args:
        listed: whether the tokenizer lists all its special tokens by name, as those of some
            families do; others only know which of their tokens are special.
    """
    facts = FAMILIES[family]
    tokenizer = deepcopy(base) if base else tiny_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    special = [AddedToken(token, special=True, normalized=False) for token in facts.special]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([AddedToken(w, special=False, normalized=False) for w in facts.words])
    tokenizer.extra_special_tokens = list(facts.special) if listed else []
    tokenizer.eos_token = tokenizer.pad_token = facts.eos or facts.end
    tokenizer.bos_token = facts.begin[0] if len(facts.begin) == 1 else None
    if facts.begin:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*facts.begin, "$A"],
            special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in facts.begin],
        )
    tokenizer.chat_template = facts.template
    return tokenizer
