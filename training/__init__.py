"""Pre-training, preparation of data, evaluation: each file here is a command, `python -m training.NAME`."""

from pyramidclip_command import expect_words

expect_words()
