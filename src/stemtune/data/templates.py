"""Chat templates for bases that have none, by name."""

from transformers import PreTrainedTokenizerBase

from stemtune.errors import ModelError

# Turns between the tokens that many bases know.
CHATML = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

# Turns in plain words, each answer ended by the end token: for a base that knows no turns at all.
DIALOGUE = """{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] + '\n\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}
{%- else -%}{{ 'User: ' + message['content'] + '\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""

NAMED = {"chatml": CHATML, "dialogue": DIALOGUE}


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer the chat template that `data.template` names, or is.

    Raises:
        ModelError: `chatml`, and the tokenizer has no tokens for it.
    """
    if template in ("chat", "plain"):
        return
    if template == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        hint = "data.template: dialogue needs no tokens of its own"
        raise ModelError("the tokenizer has no <|im_end|>", where="data.template", hint=hint)
    tokenizer.chat_template = NAMED.get(template, template)
