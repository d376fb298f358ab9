"""tokenizer.json files as published models have them, learnt from a few texts."""

import functools
import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests import tiny

END = "<|endoftext|>"
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {
    "olmoe": ("|||IP_ADDRESS|||", "<|padding|>", END),
    "qwen3_moe": (END, "<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", END),
    "mixtral": ("<unk>", "<s>", "</s>"),
}
FAMILIES = tuple(SPECIAL)


@functools.cache
def trained(family: str) -> str:
    """The text of a tokenizer.json.

    OLMoE and Qwen3-MoE are byte-level BPE without BOS, Llama 3 with one; Mixtral writes a space as
    a letter, puts one before a text, and falls back to bytes.
    """
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=family == "mixtral"))
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), SPECIAL[family]
    if family == "mixtral":
        letter = "\N{LOWER ONE EIGHTH BLOCK}"
        before = [normalizers.Prepend(letter), normalizers.Replace(" ", letter)]
        made.normalizer = normalizers.Sequence(before)
        steps = [decoders.Replace(letter, " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        alphabet, special = [], (*special, *(f"<0x{b:02X}>" for b in range(256)))
    else:
        made.normalizer = normalizers.NFC()
        made.decoder = decoders.ByteLevel()
        made.post_processor = processors.ByteLevel(trim_offsets=False)
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "qwen3_moe":
        split = pre_tokenizers.Split(tokenizers.Regex(_QWEN), "isolated")
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        initial_alphabet=alphabet,
        limit_alphabet=100 if family == "mixtral" else 1000,
        special_tokens=list(special) if family == "mixtral" else [],
        show_progress=False,
    )
    texts = [file.read_text() for file in sorted(tiny.TEXT.glob("*.txt"))]
    made.train_from_iterator(texts, trainer)
    if family == "mixtral":  # bytes are pieces and no added tokens
        fields = json.loads(made.to_str())
        fields["added_tokens"] = fields["added_tokens"][:3]
        made = tokenizers.Tokenizer.from_str(json.dumps(fields))
    else:
        made.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    if family in ("llama3", "mixtral"):
        begin = special[0] if family == "llama3" else "<s>"
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
        )
    if family == "olmoe":  # runs of spaces are tokens, and no special ones
        made.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in (8, 4, 3, 2)])
    if family == "qwen3_moe":
        made.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return made.to_str()


def end(family: str) -> str:
    return "</s>" if family == "mixtral" else END


def save(folder: Path, family: str, **changes) -> Path:
    """The file in this folder, with other fields at its top, and what names its end."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end(family)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    file = folder / "tokenizer.json"
    fields = json.loads(trained(family)) | changes
    file.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    return file


_WORDS = [
    *(" ", "  ", "   ", "    ", "\n", "\n\n", "\t", "\r\n", "the", " river", "'s", "'LL", "123"),
    *(
        "é",
        "e\u0301",
        "日本",
        "😀",
        "👩‍👩‍👧",
        "½",
        "\u200b",
        "\ufeff",
        "\ufffd",
        "ﬁ",
        "\0",
        "▁",
        "İ",
    ),
    *("<think>", "[PAD]", "<s>", "</s>", "<0x41>", *sum(SPECIAL.values(), ())),
]


def texts(count: int, seed: int = 0) -> list[str]:
    """Words that tokenizers treat each in their way, and characters of any kind."""
    rng = random.Random(seed)

    def character() -> str:
        number = rng.randrange(rng.choice((0x80, 0x800, 0x10000, 0x110000)))
        return "" if 0xD800 <= number < 0xE000 else chr(number)

    def text() -> str:
        one = rng.choice((lambda: rng.choice(_WORDS), character))
        return "".join(one() for _ in range(rng.randrange(20)))

    return [text() for _ in range(count)]
