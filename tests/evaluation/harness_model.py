"""A tiny random model with a tokenizer and a chat template, as a Hugging Face folder."""

import jax
import tokenizers as hf

from lcm import config, models, pretrained

TRAINED = 96  # tokens; some texts of `harness_tasks` are longer
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LINES = ["the quick brown fox jumps over the lazy dog", "Q: what colour is it?\nA: blue"]


def write(folder):
    """The model, at `folder/model`."""
    words = folder / "words"
    words.mkdir(parents=True)
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.save(str(words / "tokenizer.json"))
    own = (
        ("tokenizer_class", "PreTrainedTokenizerFast"),
        ("bos_token", "<s>"),
        ("eos_token", "</s>"),
    )
    lines = ", ".join(f'"{key}": "{value}"' for key, value in own)
    (words / "tokenizer_config.json").write_text(f"{{{lines}}}")
    cfg = config.shrink(config.base())
    found = pretrained.model.tokenizers.load(str(words))
    sizes = [f"model.vocab={found.vocab_size}", f"data.length={TRAINED}", f"data.tokenizer={words}"]
    cfg = config.override(cfg, sizes)
    params = models.init(cfg, jax.random.key(1))
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params)  # less uniform
    model = pretrained.Model(cfg, params, found, 0, TEMPLATE)
    return pretrained.save_folder(model, folder / "model")
