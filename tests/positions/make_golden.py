"""Frequencies and factors on cosine and sine, as transformers computes them.

    python tests/positions/make_golden.py    # writes golden/rope.json, made by transformers 5.24.0

Transformers computes in float32, so its values differ from exact ones by 1e-7 of themselves. Run it
again only for new configs in hf_configs.py, or to see what a new release changed.
"""

import importlib
import json
import pathlib

from hf_configs import CONFIGS, MULTIPLES

FILE = pathlib.Path(__file__).with_name("golden") / "rope.json"


def computed(name: str) -> list[dict]:
    """What transformers gives at each multiple of the trained length."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given, _, trained, layer_type = CONFIGS[name]
    model = given["model_type"].removesuffix("_text")
    config = AutoConfig.for_model(**json.loads(json.dumps(given)))
    parameters = config.rope_parameters
    nested = parameters.get(layer_type) is not None
    kind = (parameters[layer_type] if nested else parameters)["rope_type"]
    if kind == "default":
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        classes = [c for n, c in vars(module).items() if n.endswith("RotaryEmbedding")]
        own = [c for c in classes if hasattr(c, "compute_default_rope_parameters")]
        function = own[0].compute_default_rope_parameters
    else:
        function = ROPE_INIT_FUNCTIONS[kind]
    options = {"layer_type": layer_type} if nested else {}
    rows = []
    for multiple in MULTIPLES:
        frequencies, factor = function(config, seq_len=multiple * trained, **options)
        rows.append({"frequencies": frequencies.tolist(), "factor": float(factor)})
    return rows


def main() -> None:
    import transformers

    values = {name: computed(name) for name in CONFIGS}
    # Most do not depend on the length: one row then stands for all.
    short = {n: rows[:1] if all(r == rows[0] for r in rows) else rows for n, rows in values.items()}
    lines = [f'  "{name}": {json.dumps(rows)}' for name, rows in short.items()]
    text = ",\n".join([f'  "transformers": "{transformers.__version__}"', *lines])
    FILE.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
