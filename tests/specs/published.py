"""Published sizes: parameters of each shipped variant, from the facts sheet (sections 1.1, 2.2 and 2.3).

The sheet counts the routers' biases, which are buffers. ACTIVE counts what works on one token.
"""

PARAMETERS = {
    "nemotron4/nemotron4_15b": 15_628_775_424,
    "nemotron4/minitron_8b": 8_271_699_968,
    "nemotron4/minitron_4b": 4_190_509_056,
    "llama/llama31_8b": 8_030_261_248,
    "llama/llama31_minitron_4b_width": 4_512_746_496,
    "llama/llama31_minitron_4b_depth": 4_540_469_248,
    "mistral/mistral_nemo_12b": 12_247_782_400,
    "mistral/mistral_nemo_minitron_8b": 8_414_105_600,
    "nemotron_h/nemotron_h_4b": 4_489_223_040,
    "nemotron_h/nemotron_h_8b": 8_100_852_736,
    "nemotron_h/nemotron_h_47b": 46_791_554_816,
    "nemotron_h/nemotron_h_56b": 56_324_350_464,
    "nemotron_h/nemotron_nano_12b_v2": 12_310_001_152,
    "nemotron_h/nemotron_nano_9b_v2": 8_888_227_328,
    "nemotron_h/nemotron3_nano_4b": 3_973_556_832,
    "nemotron_h/nemotron3_nano_30b": 31_577_940_288,
    # 3,682,312 a layer, and a tied embedding with a bias (section 11.2).
    "transformer_ls/enwik8_base": 44_292_396,
    "transformer_ls/enwik8_large": 110_574_012,
    "transformer_ls/text8": 44_201_595,
}
ACTIVE = {"nemotron_h/nemotron3_nano_30b": 3_580_076_352}
ROUNDED = {"nemotron4/nemotron4_340b": 341.03e9}
TWINS = (
    "nemotron_h/tiny", "nemotron_h/tiny_moe", "nemotron4/tiny", "llama/tiny", "mistral/tiny", "transformer_ls/tiny",
    "transformer_ls/tiny_released", "retro/tiny",
)  # fmt: skip
INPUTS = {"retro/tiny": {"neighbors": (2, 8)}}
"""Inputs besides tokens that come with groups of them: the sizes behind those of batch and groups."""
