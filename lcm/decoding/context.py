"""What is done about a text that is longer than the model was trained on.

refuse  an error that says by how much, before anything is computed
slide   the first tokens and the latest ones, as many as were trained on (StreamingLLM)
config  the encoding in the config, taken at its word
NAME    an encoding that extends a rotary one: `yarn`, `dynamic_ntk`, `self_extend`, ...
"""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from lcm import models, positions
from lcm.errors import UserError
from lcm.positions import PositionEncoding
from lcm.positions.registry import ENCODINGS
from lcm.positions.rope import RoPE

SLIDE = "streaming_llm"


def fitted(model: Any, tokens: int, full: str = "refuse") -> Any:
    """The model for texts of so many tokens, prompt and generation together.

    Within the trained length it is the model as it is. A dynamic scaling and a factor are those of
    `tokens`, so texts of one call share them.

    Raises:
        UserError: for a longer text under "refuse", an unknown policy, or an encoding that the
            model's own cannot be extended by.
    """
    check(model, tokens, full)
    trained = model.cfg.data.length
    if tokens <= trained or full == "config":
        return model
    return extended(model, SLIDE if full == "slide" else full, tokens / trained)


def check(model: Any, tokens: int, full: str = "refuse") -> None:
    """Refuses an unknown policy, and texts of so many tokens under "refuse"."""
    names, trained = extensions(), model.cfg.data.length
    if full not in ("refuse", "slide", "config", *names):
        raise UserError(
            f"full={full!r} is unknown: choose from refuse, slide, config, {', '.join(names)}"
        )
    if full == "refuse" and tokens > trained:
        raise UserError(
            f"{tokens} tokens of prompt and generation exceed the context of {trained}: lower "
            "max_new_tokens, shorten the prompt, or choose what to do beyond it by full=slide or "
            "an extension such as full=self_extend; full=config trusts the config's own encoding"
        )


def extensions() -> tuple[str, ...]:
    """Names of encodings that read a trained rotary one at longer distances, as it is."""
    return tuple(
        name
        for name, kind in ENCODINGS.items()
        if kind.about.training != "from scratch"
        and (issubclass(kind, RoPE) or isinstance(getattr(kind, "rope", None), RoPE))
    )


def extended(model: Any, name: str, factor: float) -> Any:
    """The model under an extension by `factor`, in every kind of layer that sees all keys and
    rotates; layers with a window never see further than they were trained to.

    Raises:
        UserError: if no layer does, or one's rotation is scaled already.
    """
    cfg, trained = model.cfg.copy_and_resolve_references(), model.cfg.data.length
    changed = {}
    for kind in dict.fromkeys(cfg.model.pattern):
        own = cfg.model.kinds.get(kind, {})
        encoding = positions.make(own.get("positions", cfg.model.positions))
        if isinstance(encoding, RoPE) and not own.get("window", cfg.model.window):
            changed[kind] = ConfigDict(
                positions.config(_extension(name, encoding, trained, factor))
            )
    if not changed:
        raise UserError(
            f"full={name} extends a rotary encoding in layers that see all keys, this model has "
            f"{cfg.model.positions.name} and none of those: take full=refuse or full=config"
        )
    with cfg.model.unlocked():
        for kind, new in changed.items():
            if cfg.model.kinds:
                cfg.model.kinds[kind] = {**cfg.model.kinds.get(kind, {}), "positions": new}
            else:
                cfg.model.positions = new
    params = models.adopt(cfg, model.params, jax.random.key(0))
    return model._replace(cfg=cfg, params=params)


def _extension(name: str, rope: RoPE, trained: int, factor: float) -> PositionEncoding:
    kind = ENCODINGS[name]
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    if "rope" in defaults:
        window = defaults.get("window", 0)  # exact distances, half of those known at the most
        return kind(rope=rope, **({"window": min(window, trained // 2)} if window else {}))
    if type(rope) is not RoPE:
        raise UserError(
            f"full={name} scales a plain rotary encoding, this one is {type(rope).__name__}: take "
            "a remap, such as self_extend, or full=config"
        )
    own = dataclasses.asdict(rope)
    if "length" in defaults:  # dynamic: by the length itself
        return kind(**own, length=round(factor * trained))
    return kind(**own, **({"factor": float(factor)} if "factor" in defaults else {}))
