"""The audit in three: what is counted, what is made of the counts, what is drawn."""
