# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Our token ids, decoded and streamed text against PyPI `tokenizers`, on random strings.

METAL_LORA_BUILD: the build folder with `text_oracle`. METAL_LORA_LLAMA_VOCABS: the folder
vendor/llama.cpp/models of the llama-cpp-python 0.3.36 sdist. METAL_LORA_SMOLLM2: the SmolLM2 GGUF.
METAL_LORA_ORACLE_CASES: random strings per tokenizer (default 2000; 25000 before a release).
"""

import json
import os
import pathlib
import random
import subprocess
import unicodedata

import pytest

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
CASES = int(os.environ.get("METAL_LORA_ORACLE_CASES", "2000"))
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
POOLS = [
    "abcdefghijklmnopqrstuvwxyzABC", "0123456789²³½٣", " \t\n\r\u00a0\u2003\u3000",
    "'\"!?.,;:-_()[]{}<>|/\\@#$%^&*+=~`", "éüñçßøåÄÖſK", "日本語中文한국어", "🙂🚀👩‍👩‍👧‍👦🇩🇪",
    "הערבעربي", "नमस्तेไทย", "\u0301\u0308\u200d\ufe0f", "'s't're've'm'll'd'S'LL",
    "\u0085\u2028\x0b\x0c\x1c\x1f\x00\x7f\u180e", "ꯍ𝔘𝟘Ⅷǅʰ", "▁ ▁",
]


def oracle():
    build = os.environ.get("METAL_LORA_BUILD")
    if not build:
        pytest.skip("METAL_LORA_BUILD does not name the build folder")
    path = pathlib.Path(build) / "text_oracle"
    assert path.exists(), f"{path} is not built"
    return path


def strings(count, specials, seed=7):
    rng = random.Random(seed)
    prose = (ROOT / "LICENSE").read_text() + pathlib.Path(__file__).read_text()

    def one():
        kind = rng.random()
        if kind < 0.3:
            start = rng.randrange(len(prose) - 300)
            return prose[start : start + rng.randrange(1, 300)]
        if kind < 0.7:
            text = "".join(rng.choice(rng.choice(POOLS)) for _ in range(rng.randrange(1, 40)))
        else:
            pools = rng.choices(POOLS, k=rng.randrange(1, 8))
            text = "".join(rng.choice(p) for p in pools for _ in range(rng.randrange(1, 6)))
        if kind > 0.9 and specials:
            text = text[:3] + rng.choice(specials) + text + rng.choice(specials) + rng.choice(specials)
        return text

    def anything():
        ranges = [(32, 0x3000), (0xE000, 0x1FFFF)]
        return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(12))

    return ["", " ", "\n", "a"] + [one() for _ in range(count)] + [anything() for _ in range(count // 4)]


def ask(model, requests):
    text = "".join(json.dumps(r) + "\n" for r in requests)
    run = subprocess.run([oracle(), "tokenize", model], input=text, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def assigned(text):
    """Without code points that Python 3.11 knows as unassigned. Letters that came later (Beria Erfe in 17) have a
    lower case in the reference's tables and none in utf8proc 2.8's: a limit, stated in docs/dependencies.md."""
    return "".join(c for c in text if unicodedata.category(c) != "Cn")


def assert_same(reference, model, count=None, add_special=False, prepare=str):
    specials = [t.content for t in reference.get_added_tokens_decoder().values() if t.content.strip()][:200]
    texts = [prepare(t) for t in strings(CASES if count is None else count, specials)]
    answers = ask(model, [{"text": t, "add_special": add_special} for t in texts])
    assert len(answers) == len(texts)
    bad = []
    for text, answer in zip(texts, answers):
        ids = reference.encode(text, add_special_tokens=add_special).ids
        decoded = reference.decode(ids, skip_special_tokens=False)
        if answer["ids"] != ids:
            bad.append(("ids", text, ids, answer["ids"]))
        elif answer["decoded"] != decoded:
            bad.append(("decoded", text, decoded, answer["decoded"]))
        elif answer["streamed"] != decoded and "\ufffd" not in decoded:  # see StreamingDecoder
            bad.append(("streamed", text, decoded, answer["streamed"]))
    assert not bad, f"{len(bad)} of {len(texts)} differ, first: " + ascii(bad[:3])[:3000]


def assert_literal_same(reference, model, count=400):
    specials = [t.content for t in reference.get_added_tokens_decoder().values() if t.special]
    texts = [t for t in strings(4 * count, specials, seed=11) if any(s in t for s in specials)]
    assert texts
    reference.encode_special_tokens = True
    for text, answer in zip(texts, ask(model, [{"text": t, "literal": True} for t in texts])):
        assert answer["ids"] == reference.encode(text, add_special_tokens=False).ids, ascii(text)
    reference.encode_special_tokens = False


# Vocabularies of GGUF files, loaded by us from the file and from the tokenizer.json built here.


def gguf_fields(path):
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(path).fields
    return lambda key: fields["tokenizer.ggml." + key].contents() if "tokenizer.ggml." + key in fields else None


def byte_level(field, kind):
    tokens, types = field("tokens"), field("token_type")
    merges = [tuple(m.split(" ")) for m in field("merges")]
    reference = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=kind == "llama3")
    )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "gpt2":
        reference.pre_tokenizer = plain
    elif kind == "digits":
        reference.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), plain]
        )
    else:
        pattern = {"llama3": LLAMA3, "qwen2": QWEN2, "qwen35": QWEN35}[kind.split("+")[0]]
        reference.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind in ("qwen2", "qwen35"):
        reference.normalizer = normalizers.NFC()
    reference.decoder = decoders.ByteLevel()
    add_tokens(reference, tokens, types)
    return reference


def add_tokens(reference, tokens, types, special_types=(3,)):
    for i, kind in enumerate(types):
        token = AddedToken(tokens[i], special=kind in special_types, normalized=False)
        if kind in special_types:
            reference.add_special_tokens([token])
        elif kind == 4:
            reference.add_tokens([token])


def sentencepiece(field, prefix=True):
    tokens, types, scores = field("tokens"), field("token_type"), field("scores")
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores):
        local = [
            (token[:i], token[i:], score)
            for i in range(1, len(token))
            if token[:i] in vocab and token[i:] in vocab
        ]
        merges += sorted(local, key=lambda m: (vocab[m[0]], vocab[m[1]]))
    merges.sort(key=lambda m: (m[2], len(m[0]), len(m[1])), reverse=True)
    unk = tokens[types.index(2)]
    reference = Tokenizer(
        models.BPE(vocab, [m[:2] for m in merges], unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    reference.normalizer = normalizers.Sequence(steps + [normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    reference.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    add_tokens(reference, tokens, types, special_types=(2, 3))
    return reference


VOCABULARIES = {
    "gpt-2": "gpt2", "mpt": "gpt2", "starcoder": "digits", "refact": "digits",
    "llama-bpe": "llama3", "qwen2": "qwen2", "qwen35": "qwen35",
    "llama-spm": "sentencepiece", "phi-3": "sentencepiece", "baichuan": "sentencepiece",
}  # fmt: skip


def check_gguf(path, kind, tmp_path):
    field = gguf_fields(path)
    reference = sentencepiece(field) if kind == "sentencepiece" else byte_level(field, kind)
    saved = tmp_path / "tokenizer.json"
    reference.save(str(saved))
    assert_same(reference, path)
    assert_same(reference, saved, count=min(CASES, 500))
    assert_literal_same(reference, saved)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabulary_of_llama_cpp(name, tmp_path):
    folder = os.environ.get("METAL_LORA_LLAMA_VOCABS")
    if not folder:
        pytest.skip("METAL_LORA_LLAMA_VOCABS does not name the vocabularies of llama.cpp")
    check_gguf(pathlib.Path(folder) / f"ggml-vocab-{name}.gguf", VOCABULARIES[name], tmp_path)


def test_smollm2(tmp_path):
    path = os.environ.get("METAL_LORA_SMOLLM2")
    if not path:
        pytest.skip("METAL_LORA_SMOLLM2 does not name the GGUF")
    check_gguf(pathlib.Path(path), "digits", tmp_path)


# Small tokenizers of every shape, trained here.


def corpus():
    text = (ROOT / "LICENSE").read_text() + pathlib.Path(__file__).read_text()
    return [text[i : i + 400] for i in range(0, len(text), 400)] + ["".join(p) for p in POOLS]


def train(reference, vocab_size=900, **options):
    special = [
        AddedToken("<s>", special=True), AddedToken("</s>", special=True), AddedToken("<unk>", special=True),
    ]  # fmt: skip
    if options.pop("bytes", False):
        special += [AddedToken(f"<0x{b:02X}>", special=False) for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False, **options
    )
    reference.train_from_iterator(corpus(), trainer)
    return reference


def trained_byte_level(pre, normalizer=None, **model):
    reference = Tokenizer(models.BPE(**model))
    reference.pre_tokenizer = pre
    if normalizer:
        reference.normalizer = normalizer
    reference.decoder = decoders.ByteLevel()
    return train(reference, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def trained_metaspace(scheme, split):
    reference = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    reference.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split)
    reference.decoder = decoders.Metaspace("▁", scheme, split)
    return train(reference, limit_alphabet=60)


def trained_fallback(fuse_unk):
    reference = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=fuse_unk, byte_fallback=True))
    reference.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    reference.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return train(reference, limit_alphabet=60, bytes=True)


def split_then_bytes(pattern, behavior, invert=False):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SHAPES = {
    "gpt2": lambda: trained_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix_space": lambda: trained_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "smollm": lambda: trained_byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    "llama3": lambda: trained_byte_level(split_then_bytes(Regex(LLAMA3), "isolated"), ignore_merges=True),
    "qwen2": lambda: trained_byte_level(split_then_bytes(Regex(QWEN2), "isolated"), normalizers.NFC()),
    "nfkd_lowercase": lambda: trained_byte_level(
        BYTES, normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase(), normalizers.Strip()])
    ),
    "nfkc": lambda: trained_byte_level(BYTES, normalizers.NFKC()),
    "nfd_replace": lambda: trained_byte_level(
        BYTES, normalizers.Sequence([normalizers.NFD(), normalizers.Replace(Regex(r"\s+"), "_")])
    ),
    "bytes_then_digits": lambda: trained_byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(False), pre_tokenizers.Digits(False)]
        )
    ),
    "removed": lambda: trained_byte_level(split_then_bytes(" ", "removed")),
    "contiguous": lambda: trained_byte_level(split_then_bytes(Regex("[0-9]"), "contiguous")),
    "with_previous": lambda: trained_byte_level(split_then_bytes(Regex(r"\s"), "merged_with_previous")),
    "with_next": lambda: trained_byte_level(split_then_bytes(Regex(r"\s"), "merged_with_next")),
    "inverted": lambda: trained_byte_level(split_then_bytes(Regex(r"\w+"), "isolated", True)),
    "whitespace": lambda: trained_byte_level(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES])),
    "whitespace_split": lambda: trained_byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES])
    ),
    "metaspace_always": lambda: trained_metaspace("always", True),
    "metaspace_first": lambda: trained_metaspace("first", False),
    "metaspace_never": lambda: trained_metaspace("never", True),
    "fallback": lambda: trained_fallback(False),
    "fallback_fused": lambda: trained_fallback(True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_trained(shape, tmp_path):
    reference = SHAPES[shape]()
    reference.add_tokens([AddedToken("the", single_word=True), AddedToken("<lr>", lstrip=True, rstrip=True)])
    reference.add_tokens([AddedToken("Ünter", normalized=True), AddedToken("  \t", normalized=False)])
    reference.add_special_tokens([AddedToken("<|im_end|>"), AddedToken("<|im_end|>x", rstrip=True)])
    reference.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    path = tmp_path / "tokenizer.json"
    reference.save(str(path))
    prepare = assigned if shape == "nfkd_lowercase" else str
    assert_same(reference, path, add_special=True, count=max(200, CASES // 4), prepare=prepare)
    assert_literal_same(reference, path, count=100)


def test_merges_as_strings_are_merges_as_pairs(tmp_path):
    reference = SHAPES["gpt2"]()
    path = tmp_path / "tokenizer.json"
    reference.save(str(path))
    data = json.loads(path.read_text())
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]
    path.write_text(json.dumps(data))
    assert_same(reference, path, count=200)


REFUSED = {
    "Unigram": ("model", {"type": "Unigram", "vocab": []}),
    "WordPiece": ("model", {"type": "WordPiece", "vocab": {}}),
    "BertNormalizer": ("normalizer", {"type": "BertNormalizer"}),
    "BertPreTokenizer": ("pre_tokenizer", {"type": "BertPreTokenizer"}),
    "CTC": ("decoder", {"type": "CTC"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_lack_is_refused_by_name(name, tmp_path):
    path = tmp_path / "tokenizer.json"
    SHAPES["gpt2"]().save(str(path))
    data = json.loads(path.read_text())
    member, value = REFUSED[name]
    data[member] = value
    path.write_text(json.dumps(data))
    run = subprocess.run([oracle(), "tokenize", path], input="", capture_output=True, text=True)
    assert run.returncode == 1 and f'"{name}"' in run.stderr
