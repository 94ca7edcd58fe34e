"""Small tokenizers of each kind, and text that is hard on them."""

from core.data.tokenizers.tokenizer import (
    ByteTokenizer,
)
from core.data.tokenizers.training import train_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards mix 12 jugs of juice"
TEXTS = [f"{WORDS[i:]}\n  {WORDS[:i]}.\t<|end|> \u00e9t\u00e9 {i}\r\n" for i in range(80)]
BPE = train_tokenizer("bpe", TEXTS, 420)
UNIGRAM = train_tokenizer("unigram", TEXTS, 420)
BYTE = ByteTokenizer()
CHAR = train_tokenizer("char", TEXTS)
ALL = {"bpe": BPE, "unigram": UNIGRAM, "byte": BYTE, "char": CHAR}
PIECES = ["bpe", "unigram"]
AWKWARD = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\r\n\t\t",
    "\u2581a\u2581\u2581 b\u2581",
    "\x00a\x00",
    "\u2028\u2029\u0085",
    "\u2585 reserved by the trainer",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0e01\u0e33 \u202eabc",
    "e\u0301 is not \u00e9; \ufb01 is not fi; \uff21 is not A",
    "<s></s><unk><pad><0x41><|system|><|user|><|assistant|><|end|>",
    "\ufeffbom",
    "\uffff\ufffe\ue000",
]
