"""The kinds of terms that a training has beside level pairs, each in a file of its own."""
