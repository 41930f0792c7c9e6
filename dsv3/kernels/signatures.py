"""What a launch would say of each kernel's arguments, for compiling it without a launch
(``dsv3.kernels.compiled``)."""

from dsv3.fields import BLOCK

# Of each kernel: its module, what a launch would say of each argument, and the constants, those of
# a middle tile shape. A descriptor says the shape of its tiles.
KERNELS = {
    "act_quant": (
        "act_quant",
        dict(x_ptr="*bf16", code_ptr="*u8", scale_ptr="*fp32", rows="i32", cols="i32", tiles="i32"),
        dict(POWER_OF_TWO=False, ROWS=16, BLOCK=BLOCK),
    ),
    "column_quant": (
        "column_quant",
        dict(
            x_ptr="*bf16",
            code_ptr="*u8",
            scale_ptr="*fp32",
            tokens="i32",
            channels="i32",
            token_stride="i32",
        ),
        dict(POWER_OF_TWO=False, BLOCK=BLOCK, COLS=64),
    ),
    "weight_dequant": (
        "weight_dequant",
        dict(
            code_ptr="*u8", scale_ptr="*fp32", out_ptr="*i16", rows="i32", cols="i32", tiles="i32"
        ),
        dict(BFLOAT16=True, ROWS=32, BLOCK=BLOCK),
    ),
    "fp8_gemm": (
        "fp8_gemm",
        dict(
            x_ptr="*fp8e4nv",
            sx_ptr="*fp32",
            w_ptr="*fp8e4nv",
            sw_ptr="*fp32",
            out_ptr="*fp32",
            m="i32",
            n="i32",
            k="i32",
            m_bucket="i32",
        ),
        dict(ROWS=64, COLS=128, BLOCK=BLOCK, GROUP=8),
    ),
    "persistent_gemm": (
        "persistent_gemm",
        dict(
            x_desc="tensordesc<fp8e4nv[{ROWS}, {BLOCK}]>",
            sx_ptr="*fp32",
            w_desc="tensordesc<fp8e4nv[{COLS}, {BLOCK}]>",
            sw_ptr="*fp32",
            out_ptr="*fp32",
            m="i32",
            n="i32",
            k="i32",
            sx_row="i32",
            sx_block="i32",
            sw_row="i32",
            sw_block="i32",
            in_part="i32",
        ),
        dict(
            ROWS=128,
            COLS=128,
            BLOCK=BLOCK,
            GROUP=8,
            SWAP=False,
            SPLIT=False,
            FOLD=False,
            PAIR=False,
            W_TILES=False,
        ),
    ),
    "expert_hidden": (
        "experts",
        dict(
            x_desc="tensordesc<fp8e4nv[{ROWS}, {BLOCK}]>",
            sx_ptr="*fp32",
            w13_desc="tensordesc<fp8e4nv[{COLS}, {BLOCK}]>",
            s13_ptr="*fp32",
            ends_ptr="*i64",
            code_ptr="*u8",
            scale_ptr="*fp32",
            experts="i32",
            inner="i32",
            k="i32",
            sx_row="i32",
            sx_block="i32",
        ),
        dict(ROWS=64, COLS=128, BLOCK=BLOCK, SWAP=False, POWER_OF_TWO=False, EXPERTS=256),
    ),
    "expert_out": (
        "experts",
        dict(
            x_desc="tensordesc<fp8e4nv[{ROWS}, {BLOCK}]>",
            sx_ptr="*fp32",
            w2_desc="tensordesc<fp8e4nv[{COLS}, {BLOCK}]>",
            s2_ptr="*fp32",
            ends_ptr="*i64",
            out_ptr="*fp32",
            experts="i32",
            n="i32",
            inner="i32",
        ),
        dict(ROWS=128, COLS=128, BLOCK=BLOCK, SWAP=False, EXPERTS=256),
    ),
    "add_parts": (
        "persistent_gemm",
        dict(part_ptr="*fp32", out_ptr="*i16", numbers="i32", parts="i32"),
        dict(SIZE=512),
    ),
    "mla_decode": (
        "mla_decode",
        dict(
            q_ptr="*fp32",
            seen_ptr="*bf16",
            scale_ptr="*bf16",
            rope_ptr="*bf16",
            reach_ptr="*i64",
            out_ptr="*fp32",
            total_ptr="*fp32",
            rows="i32",
            heads="i32",
            splits="i32",
            row_stride="i32",
            key_stride="i32",
            softmax_scale="fp32",
        ),
        dict(
            FIRST_PART=256,
            PARTS_ALIKE=16,
            LATENT=512,
            ROPE=64,
            LATENT_WIDE=512,
            ROPE_WIDE=64,
            ROWS=32,
            KEYS=64,
            PARTS=2,
            PACKED=False,
            TILES=4,
            BLOCK=BLOCK,
            INTERPRETED=False,
        ),
    ),
    "mla_combine": (
        "mla_decode",
        dict.fromkeys(("part_ptr", "total_ptr", "out_ptr"), "*fp32")
        | dict(rows="i32", splits="i32"),
        dict(LATENT=512, LATENT_WIDE=512),
    ),
    "mla_prefill": (
        "mla_prefill",
        dict.fromkeys(("qn_ptr", "qr_ptr", "kv_ptr", "kr_ptr"), "*fp32")
        | dict(reach_ptr="*i64", out_ptr="*fp32", queries="i32", keys="i32", heads="i32")
        | dict(kr_row_stride="i32", kr_key_stride="i32", softmax_scale="fp32"),
        dict(NOPE=128, ROPE=64, VALUE=128, NOPE_WIDE=128, ROPE_WIDE=64, VALUE_WIDE=128)
        | dict(ROWS=128, KEYS=64, PARTS=2, INTERPRETED=False),
    ),
    "router": (
        "router",
        dict(u_ptr="*bf16", w_ptr="*fp32", bias_ptr="*fp32", part_ptr="*fp32")
        | dict(weight_out_ptr="*fp32", chosen_ptr="*i64", rows="i32", width="i32", scaling="fp32"),
        dict(GROUPS=8, EACH=32, GROUPS_WIDE=8, EACH_WIDE=32, OPEN=4, K=8, K_WIDE=8)
        | dict(SIGMOID=True, BIASED=True, NORMALIZED=True)
        | dict(ROWS=16, DEPTH=32, PART=256, SPLIT=True, INTERPRETED=False),
    ),
    "router_choose": (
        "router",
        dict(part_ptr="*fp32", bias_ptr="*fp32", weight_out_ptr="*fp32", chosen_ptr="*i64")
        | dict(rows="i32", splits="i32", scaling="fp32"),
        dict(GROUPS=8, EACH=32, GROUPS_WIDE=8, EACH_WIDE=32, OPEN=4, K=8, K_WIDE=8)
        | dict(SIGMOID=True, BIASED=True, NORMALIZED=True, ROWS=16),
    ),
    "norm_quant": (
        "norm_quant",
        dict(x_ptr="*bf16", weight_ptr="*fp32", y_ptr="*i16")
        | dict(code_ptr="*u8", scale_ptr="*fp32", cols="i32", eps="fp32"),
        dict(KEEPS=True, POWER_OF_TWO=False, TILES=56, TILES_WIDE=64, BLOCK=BLOCK),
    ),
    "combine": (
        "combine",
        dict(y_ptr="*fp32", weight_ptr="*fp32", place_ptr="*i64", used_ptr="*i64")
        | dict(out_ptr="*fp32", width="i32"),
        dict(K=8, K_WIDE=8, COLS=1024),
    ),
}
# Pointers whose type follows a constant: the cache holds codes where it is packed.
BY_CONSTANT = {
    ("mla_decode", "PACKED", True): dict(seen_ptr="*u8", scale_ptr="*fp32"),
    ("mla_prefill", "PARTS", 1): dict.fromkeys(("qn_ptr", "qr_ptr", "kv_ptr", "kr_ptr"), "*bf16"),
}
# Sizes that a launch may take for multiples of 16, so that memory is read 16 bytes at a time.
MULTIPLES = ("cols", "n", "k", "inner", "channels", "token_stride", "numbers")
MULTIPLES += ("row_stride", "key_stride", "width", "kr_row_stride", "kr_key_stride")
