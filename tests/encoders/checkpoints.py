"""Tiny checkpoints with random weights, written by each library's own code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "two", "small", "dog",
         "on", "the", "green", "hill", "and", ",", "."]  # fmt: skip
MAX_TOKENS = 24


def save_bert(folder: Path, *, seed: int) -> Path:
    """Save a BERT of 2 layers of 32, and its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=MAX_TOKENS,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return folder


def save_sentence_transformer(
    folder: Path, bert: Path, *, pooling: str, max_tokens: int, width: int | None = None
) -> Path:
    """Save a sentence-transformers folder: the BERT, a pooling, a Dense of `width` if given, Normalize."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(1)
    transformer = modules.Transformer(str(bert), max_seq_length=max_tokens)
    parts: list[Any] = [transformer, modules.Pooling(32, pooling_mode=pooling)]
    if width is not None:
        parts.append(modules.Dense(32, width))
    SentenceTransformer(modules=[*parts, modules.Normalize()], device="cpu").save(str(folder), create_model_card=False)
    return folder


def save_timm(name: str, folder: Path, *, seed: int) -> Path:
    """Save the state dict of a timm model, classifier included."""
    import timm

    torch.manual_seed(seed)
    path = folder / f"{name}.safetensors"
    save_file(timm.create_model(name, pretrained=False).state_dict(), path)
    return path


def save_dinov2(folder: Path, *, num_registers: int) -> Path:
    """Save a DINOv2 of 2 layers of 32 at 28 px, and its image processor."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    if num_registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=num_registers)
        transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    else:
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return folder


def save_vit(folder: Path) -> Path:
    """Save a ViT of 2 layers of 32 at 32 px, and its image processor, which does not convert images to RGB."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=64)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


SPEECH_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,  # torch 2.13 with AMX computes wrong bfloat16 values for groups of 8 channels
    "vocab_size": 20,
}
"""Sizes of a wav2vec 2.0 whose convolutions are as in the published models."""


def save_speech(folder: Path, name: str, *, seed: int, **options: Any) -> Path:
    """Save a wav2vec 2.0 or HuBERT of 2 layers of 16, `Wav2Vec2` or `Hubert`, and its feature extractor."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SPEECH_SIZES, **options)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def save_whisper(folder: Path, *, seed: int) -> Path:
    """Save a Whisper of 2 layers of 16, and the same for CTranslate2 in the folder `ctranslate2` in it."""
    import transformers
    from ctranslate2.converters import TransformersConverter

    torch.manual_seed(seed)
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, max_target_positions=16, **sizes, **tokens
    )
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    TransformersConverter(str(folder)).convert(str(folder / "ctranslate2"))
    return folder


def write_clip_config(folder: Path) -> Path:
    """Write an open_clip architecture of 2 layers of 32 at 32 px, named `tiny-clip`."""
    folder.mkdir(parents=True, exist_ok=True)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    path = folder / "tiny-clip.json"
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    return path


def save_clip(path: Path) -> Path:
    """Write random weights of `tiny-clip`, and register its architecture with open_clip."""
    import open_clip

    open_clip.add_model_config(write_clip_config(path.parent))
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), path)
    return path


def copy_changed(folder: Path, copy: Path) -> Path:
    """Copy a model and change one value of its weights."""
    shutil.copytree(folder, copy)
    change_one_weight(copy / "model.safetensors")
    return copy


def change_one_weight(path: Path, change: Callable[[Any], Any] = lambda tensor: tensor + 1) -> None:
    """Change one value in a safetensors file, in place."""
    state = load_file(path)
    name = min(key for key, tensor in state.items() if tensor.is_floating_point())
    first = state[name].clone()
    first.view(-1)[0] = change(first.view(-1)[0])
    save_file({**state, name: first}, path, metadata={"format": "pt"})
