"""Recurrent layers instead of attention, or beside it, on the byte-level decoder.

    lcm train --config configs/recurrent.py:griffin --workdir runs/griffin
    lcm evaluate runs/griffin

    mamba2     Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060): no attention, no MLP
    griffin    two gated linear recurrences to one layer of local attention (De et al., 2024,
               arXiv:2402.19427), whose window of 1,024 is scaled to rows of 256
    retnet, gla, gated_deltanet, kda, mlstm
               a matrix for a state, with an MLP behind it: retention (arXiv:2307.08621), gated
               linear attention (arXiv:2312.06635), the gated delta rule (arXiv:2412.06464), Kimi's
               (arXiv:2510.26692), xLSTM's (arXiv:2405.04517)
    delta_hybrid
               three Gated DeltaNets to one layer of attention, the pattern of Qwen3-Next and
               OLMo-Hybrid, without their experts
    mamba3     Mamba-3 (2026, arXiv:2603.15569), with an MLP behind it, as its authors have it
    mamba3_mimo
               the same with two inputs and outputs for each head
    rwkv4, rwkv6, rwkv7
               RWKV's time mixing and channel mixing by turns (arXiv:2305.13048, 2404.05892,
               2503.14456)
    zamba2     Mamba-2, and in front of every third layer a use of one of two blocks of attention
               and MLP by turns, that read the embeddings, too (Glorioso et al., 2024,
               arXiv:2411.15242)
    mamba1     Mamba (Gu and Dao, 2023, arXiv:2312.00752): no attention, no MLP
    hawk       gated linear recurrences without attention (of the same paper as griffin)
    samba      Mamba and attention in a window by turns, an MLP after each (Ren et al., 2024,
               arXiv:2406.07522)
    jamba      eight layers, the fifth of them attention without positions, the others Mamba with
               norms inside (Lieber et al., 2024, arXiv:2403.19887), with MLPs in place of experts
    jamba_experts
               the same with four experts in every second layer, of which a token takes two, and
               the loss that balances them
    lfm2       two gated convolutions of three tokens to one layer of attention, an MLP after each
               (Liquid AI, 2025, arXiv:2511.23404), where releases have attention more densely in
               their upper half

0.9M parameters each, 8.2M tokens. None has been trained to the end yet.
"""

from ml_collections import ConfigDict

from lcm import config

MATRIX = (
    "model.depth=4",
    "model.hidden=192",
    "model.state=32",
    "model.expand=2",
)
HEAD = 32  # of RWKV, where releases have 64
SHAPES: dict[str, tuple[str, ...]] = {
    "mamba2": (
        "model.depth=7",
        "model.pattern=mamba2",
        "model.mlp=none",
        "model.heads=8",
        "model.state=64",
    ),
    "zamba2": (
        "model.depth=7",
        "model.pattern=mamba2,mamba2,first,mamba2,mamba2,second,mamba2",
        "model.mlp=none",
        "model.heads=8",
        "model.state=32",
        "model.expand=1",
        *(
            f"model.kinds.{name}.{key}"
            for block, name in enumerate(("first", "second"))
            for key in (
                "mixer=shared_attention",
                "mlp=geglu_exact",
                "heads=4",
                "hidden=128",
                f"options=block={block},rank=8",
            )
        ),
    ),
    "mamba1": (
        "model.depth=7",
        "model.pattern=mamba1",
        "model.mlp=none",
        "model.state=16",
    ),
    "hawk": (
        "model.depth=6",
        "model.pattern=rglru",
        "model.mlp=geglu",
        "model.hidden=224",
        "model.expand=1",
    ),
    "samba": (
        "model.depth=4",
        "model.pattern=mamba,local",
        "model.hidden=320",
        "model.kinds.mamba.mixer=mamba1",
        "model.kinds.mamba.state=16",
        "model.kinds.local.mixer=attention",
        "model.kinds.local.window=64",
    ),
    "jamba": (
        "model.depth=8",
        "model.pattern=mamba,mamba,mamba,mamba,whole,mamba,mamba,mamba",
        "model.hidden=128",
        "model.kinds.mamba.mixer=mamba1",
        "model.kinds.mamba.state=16",
        "model.kinds.mamba.expand=1",
        "model.kinds.mamba.options=normed=True",
        "model.kinds.whole.mixer=attention",
        "model.kinds.whole.positions=nope",
        "model.kinds.whole.kv_heads=2",
    ),
    "jamba_experts": (
        "model.depth=8",
        "model.pattern=mamba,many,mamba,many,whole,many,mamba,many",
        "model.hidden=144",
        *(
            f"model.kinds.{name}.{key}"
            for name in ("mamba", "many")
            for key in ("mixer=mamba1", "state=16", "expand=1", "options=normed=True")
        ),
        "model.kinds.many.mlp=experts",
        "model.kinds.many.hidden=24",
        "model.kinds.many.mlp_options=count=4,top=2,balance=0.001",
        "model.kinds.whole.mixer=attention",
        "model.kinds.whole.positions=nope",
        "model.kinds.whole.kv_heads=2",
    ),
    "lfm2": (
        "model.depth=6",
        "model.pattern=conv,conv,full_attention",
        "model.hidden=224",
        "model.kinds.conv.mixer=gated_conv",
        "model.kinds.conv.conv=3",
        "model.kinds.conv.heads=1",  # it has none
        "model.kinds.conv.expand=1",
        "model.kinds.full_attention.mixer=attention",
        "model.kinds.full_attention.kv_heads=2",
        "model.kinds.full_attention.qk_norm=True",
    ),
    "griffin": (
        "model.depth=6",
        "model.pattern=rglru,rglru,local",
        "model.mlp=geglu",
        "model.hidden=256",
        "model.kinds.rglru.mixer=rglru",
        "model.kinds.rglru.expand=1",
        "model.kinds.local.mixer=attention",
        "model.kinds.local.kv_heads=1",
        "model.kinds.local.window=64",
    ),
    **{
        name: (*MATRIX, f"model.pattern={name}")
        for name in ("retnet", "gla", "gated_deltanet", "mlstm")
    },
    "mamba3": (*MATRIX, "model.pattern=mamba3", "model.hidden=256"),
    "mamba3_mimo": (
        *MATRIX,
        "model.pattern=mamba3",
        "model.hidden=240",
        "model.options=rank=2",
    ),
    **{
        name: (
            "model.depth=8",
            f"model.pattern={name},{name}_channels",
            "model.mlp=none",
            "model.norm=layer",
            "model.embed_norm=True",
            "model.expand=1",
            f"model.state={HEAD}",
            f"model.heads={128 // HEAD}",
            f"model.hidden={hidden}",
        )
        for name, hidden in (("rwkv4", 512), ("rwkv6", 224), ("rwkv7", 448))
    },
    "kda": (*MATRIX, "model.pattern=kda", "model.hidden=64"),
    "delta_hybrid": (
        *MATRIX,
        "model.hidden=256",
        "model.pattern=gated_deltanet,gated_deltanet,gated_deltanet,attention",
    ),
}


def get_config(arg: str = "griffin") -> ConfigDict:
    """A model's name (griffin), or `NAME,tiny` or `tiny` for a run of seconds."""
    words = [word for word in arg.split(",") if word]
    name, *rest = [word for word in words if word != "tiny"] or ["griffin"]
    if rest or name not in SHAPES:
        raise config.unknown_argument(arg, *SHAPES, "tiny")
    cfg = config.override(config.base(), [*SHAPES[name], "train.steps=2000"])
    cfg.name = name
    if "tiny" in words:
        config.shrink(cfg)
        cfg.model.hidden = 32
    return cfg
