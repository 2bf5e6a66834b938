"""From other formats to a folder that `from_pretrained` loads, and back: `python -m conversion.NAME`."""

from pyramidclip_command import expect_words

expect_words()
