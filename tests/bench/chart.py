"""The speed table as a picture, each ratio as a bar with its spread beside what is wanted of it, and as Markdown."""

from pathlib import Path


def markdown_table(result: dict) -> str:
    """The rows of `tests.bench` as docs/speed.md shows them: smallest and largest ratio of a round in brackets."""
    lines = ["| what | wanted | measured | a second: ours, the other |", "|---|---|---|---|"]
    for row in result["rows"]:
        if "ratio" in row:
            low, high = row["spread"]
            measured = f"{row['ratio']:.2f} x ({low:.2f} to {high:.2f})"
            both = f"{row['items_per_second']:.4g}, {row['items_per_second_of_the_other']:.4g}"
            lines.append(f"| {row['row']} | {row['at_least']:g} x | {measured} | {both} |")
        else:
            lines.append(f"| {row['row']} | at most {row['at_most']:g} | {row['value']:.2f} | |")
    return "\n".join(lines) + "\n"


def draw_chart(result: dict, path: Path) -> None:
    """Writes a PNG of the rows of `tests.bench` that are ratios."""
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if "ratio" in row][::-1]
    figure, axis = plt.subplots(figsize=(10, 0.5 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        reached = row["ratio"] >= row["at_least"]
        low, high = row["spread"]
        error = [[row["ratio"] - low], [high - row["ratio"]]]
        axis.barh(place, row["ratio"], xerr=error, color="#2f7d4f" if reached else "#b4541a", height=0.6)
        axis.plot([row["at_least"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
    axis.set_yticks(range(len(rows)), [row["row"] for row in rows])
    axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    machine = result["machine"]
    axis.set_xlabel(f"times faster ({machine['threads']} threads, torch {machine['torch']}); black: wanted")
    figure.savefig(path, dpi=100)
    plt.close(figure)
