// What is too faint on a page: texts whose contrast with the colour behind them is below 4.5 to 1 (WCAG 2.2, 1.4.3).
() => {
  const numbers = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const part = (v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const over = (front, back, share) => front.slice(0, 3).map((v, n) => v * share + back[n] * (1 - share));
  const behind = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) {
      const colour = numbers(getComputedStyle(one).backgroundColor);
      const share = colour.length > 3 ? colour[3] : colour.length ? 1 : 0;
      if (share) layers.push([colour, share]);
      if (share === 1) break;
    }
    return layers.reverse().reduce((back, [colour, share]) => over(colour, back, share), [255, 255, 255]);
  };
  const opacity = (element) => {
    let share = 1;
    for (let one = element; one; one = one.parentElement) share *= Number(getComputedStyle(one).opacity);
    return share;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("script, style, svg")) continue;
    const back = behind(element);
    const front = numbers(getComputedStyle(element).color);
    const seen = over(front, back, (front.length > 3 ? front[3] : 1) * opacity(element));
    const [a, b] = [light(seen), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${element.tagName} ${element.textContent.trim().slice(0, 40)}`);
  }
  return found;
}
