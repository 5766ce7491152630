"""Names of the backends. They are selected in `griffin.kernels.selection`, of attention in its own folder."""

AUTO = "auto"
# A loop over time that defines the operation; PyTorch operations optimised for CPUs; Triton programs.
BACKENDS = ("reference", "cpu", "triton")
# In order of preference: FlashAttention 3; PyTorch's varlen_attn, FlexAttention and scaled_dot_product_attention.
ATTENTION_BACKENDS = ("flash", "varlen", "flex", "sdpa")
