"""Tiny models of common families, with random weights, saved as their libraries save them.

The configurations of transformers, open_clip and timm are real but small; nothing is downloaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
LLM = {
    **TINY,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
BERT = {**TINY, "vocab_size": 40, "max_position_embeddings": 20}
VIT = {**TINY, "image_size": 16, "patch_size": 8}
STAGES = {"depths": [1, 2, 1, 1], "image_size": 32}


def causal(kind: str, **config: Any) -> Callable[[Path], None]:
    """A language model of this `model_type`."""
    return _hugging_face(kind, "AutoModelForCausalLM", **config)


def _hugging_face(kind: str, auto: str, **config: Any) -> Callable[[Path], None]:
    def make(room: Path) -> None:
        import torch
        import transformers

        torch.manual_seed(0)
        made = transformers.AutoConfig.for_model(kind, **config)
        getattr(transformers, auto).from_config(made).save_pretrained(room)

    return make


def _composed(
    model: str, config: str, parts: dict[str, tuple[str, dict[str, Any]]], **more: Any
) -> Callable[[Path], None]:
    def make(room: Path) -> None:
        import torch
        import transformers

        torch.manual_seed(0)
        made = {key: transformers.AutoConfig.for_model(kind, **given) for key, (kind, given) in parts.items()}
        as_dicts = {key: value.to_dict() for key, value in made.items()}
        getattr(transformers, model)(getattr(transformers, config)(**as_dicts, **more)).save_pretrained(room)

    return make


def _open_clip(vision: dict[str, Any], text: dict[str, Any] | None = None) -> Callable[[Path], None]:
    def make(room: Path) -> None:
        import open_clip
        import torch
        from safetensors.torch import save_model

        torch.manual_seed(0)
        given = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 3, **(text or {})}
        kind = open_clip.CustomTextCLIP if "hf_model_name" in given else open_clip.CLIP
        model = kind(16, vision_cfg=vision, text_cfg=given)
        save_model(model, str(room / "open_clip_model.safetensors"))

    return make


def _timm(name: str, **config: Any) -> Callable[[Path], None]:
    def make(room: Path) -> None:
        import timm
        import torch
        from safetensors.torch import save_model

        torch.manual_seed(0)
        save_model(timm.create_model(name, num_classes=4, **config), str(room / "model.safetensors"))

    return make


_TEXT = {**TINY, "vocab_size": 40, "max_position_embeddings": 8}
FAMILIES: dict[str, Callable[[Path], None]] = {
    "Llama": causal("llama", **LLM),
    "Mistral": causal("mistral", **LLM),
    "Qwen2": causal("qwen2", **LLM, tie_word_embeddings=True),
    "Qwen3": causal("qwen3", **LLM, head_dim=8),
    "Gemma": causal("gemma", **LLM, head_dim=8),
    "Phi-3": causal("phi3", **LLM),
    "GPT-2": causal("gpt2", n_embd=16, n_head=2, n_layer=3, vocab_size=40, n_positions=20),
    "GPT-NeoX": causal("gpt_neox", **LLM),
    "Falcon": causal("falcon", **LLM),
    "BLOOM": causal("bloom", vocab_size=40, hidden_size=16, n_layer=3, n_head=2),
    "MPT": causal("mpt", d_model=16, n_heads=2, n_layers=3, vocab_size=40, max_seq_len=20),
    "T5": _hugging_face("t5", "AutoModelForSeq2SeqLM", d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=40),
    "BART": _hugging_face("bart", "AutoModelForSeq2SeqLM", d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=40, max_position_embeddings=20),
    "Whisper": _hugging_face("whisper", "AutoModelForSpeechSeq2Seq", d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60, num_mel_bins=4, max_source_positions=8, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3),
    "BERT": _hugging_face("bert", "AutoModelForMaskedLM", **BERT),
    "RoBERTa": _hugging_face("roberta", "AutoModelForMaskedLM", **BERT),
    "ViT": _hugging_face("vit", "AutoModelForImageClassification", **VIT),
    "DistilBERT": _hugging_face("distilbert", "AutoModelForMaskedLM", dim=16, hidden_dim=32, n_heads=2, n_layers=3, vocab_size=40, max_position_embeddings=20),
    "ModernBERT": _hugging_face("modernbert", "AutoModelForMaskedLM", **BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    "DINOv2": _hugging_face("dinov2", "AutoModel", **VIT),
    "CLIP": _composed("CLIPModel", "CLIPConfig", {"text_config": ("clip_text_model", {**_TEXT, "num_hidden_layers": 2}), "vision_config": ("clip_vision_model", VIT)}, projection_dim=16),
    "SigLIP": _composed("SiglipModel", "SiglipConfig", {"text_config": ("siglip_text_model", {**_TEXT, "num_hidden_layers": 2}), "vision_config": ("siglip_vision_model", VIT)}),
    "open_clip ViT": _open_clip({"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 4}),
    "open_clip RN50": _open_clip({"image_size": 32, "width": 8, "layers": [2, 1, 1, 1]}),
    "open_clip timm ViT": _open_clip({"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}),
    "open_clip ConvNeXt": _open_clip({"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}),
    "Swin": _hugging_face("swin", "AutoModelForImageClassification", **STAGES, embed_dim=8, num_heads=[1, 1, 1, 1], window_size=2, patch_size=2),
    "ConvNeXt": _hugging_face("convnext", "AutoModelForImageClassification", depths=[1, 2, 1, 1], hidden_sizes=[4, 8, 8, 8]),
    "ResNet": _hugging_face("resnet", "AutoModelForImageClassification", depths=[1, 2, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8),
    "timm ResNet": _timm("test_resnet"),
    "timm ConvNeXt": _timm("test_convnext"),
    "timm Swin": _timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 2, 1, 1), num_heads=(1, 1, 1, 1)),
    "LLaVA": _composed("LlavaForConditionalGeneration", "LlavaConfig", {"vision_config": ("clip_vision_model", VIT), "text_config": ("llama", {**LLM, "num_hidden_layers": 2})}, image_token_index=5),
    "Qwen2-VL": _composed("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {"text_config": ("qwen2_vl_text", {**LLM, "num_hidden_layers": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}), "vision_config": ("qwen2_vl_vision" , {"depth": 3, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4})}),
    "Qwen3-VL": _composed("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {"text_config": ("qwen3_vl_text", {**LLM, "head_dim": 8}), "vision_config": ("qwen3_vl_vision", {"depth": 4, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "num_heads": 2, "patch_size": 4, "deepstack_visual_indexes": [1, 2]})}),
    "Mixtral": causal("mixtral", **LLM, **MOE),
    "Qwen3-MoE": causal("qwen3_moe", **LLM, **MOE, head_dim=8),
    "DeepSeek-V3": causal("deepseek_v3", **{**LLM, "num_key_value_heads": 2}, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, num_experts_per_tok=1, moe_intermediate_size=24, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
}  # fmt: skip
"""What writes a model of each family into a directory."""
