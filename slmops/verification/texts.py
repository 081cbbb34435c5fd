"""Which texts are models asked that nobody gave rows for? Probes of a tokenizer's habits, and openings to go on from."""

# Every kind of character that a tokenizer treats on its own.
PROBES = (
    "",
    " ",
    "a",
    " leading and trailing ",
    "double  space,\ttab,\nline,\n\nparagraph\r\n",
    "Don't stop: it's 3.14, 1,000,000 and 42%!",
    "snake_case camelCase HTTP2 <tag> {json: [1, 2]} a/b\\c",
    "naïve café Ångström ﬁne Straße İstanbul",
    "日本語の文 中文 한국어 العربية עברית हिन्दी",
    "emoji 🙂👩‍👩‍👧 and \u200bzero\u00a0width",
    "<s> </s> <unk> <|im_start|>user<|im_end|> [INST]",
    "0 00 000 0000 12345678901234567890",
)

# Beginnings that any language model goes on from; of the self-test, whose answers mean nothing but that they stay the same.
OPENINGS = ("Once upon a time, there was a", "The answer is", "In the morning she opened the window and", "def add(a, b):")
