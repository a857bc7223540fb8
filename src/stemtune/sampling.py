"""How a reply is drawn."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """In transformers' terms. Temperature 0 takes the likeliest token each time; `top_k` and
    `min_p` of 0, `top_p` and `repetition_penalty` of 1 change nothing."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.05
    max_new_tokens: int = 256
    seed: int | None = None
