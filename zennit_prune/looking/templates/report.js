'use strict';
for (const plot of document.querySelectorAll('.plot')) {
  const says = JSON.parse(plot.querySelector('script').textContent);
  const columns = Number(plot.dataset.columns), rows = Number(plot.dataset.rows);
  const spots = plot.dataset.spots === undefined ? null : JSON.parse(plot.dataset.spots);
  const frame = plot.querySelector('.frame'), cursor = plot.querySelector('.cursor');
  const output = plot.parentElement.querySelector('output'), quiet = output.textContent;
  let at = -1;
  const show = (index) => {
    at = Math.max(0, Math.min(says.length - 1, index));
    const column = at % columns, row = Math.floor(at / columns);
    cursor.style.display = 'block';
    cursor.style.left = (spots ? spots[column] : 100 * column / columns) + '%';
    cursor.style.width = (spots ? 0 : 100 / columns) + '%';
    cursor.style.top = 100 * row / rows + '%';
    cursor.style.height = 100 / rows + '%';
    output.textContent = says[at];
    output.classList.add('live');
  };
  const hide = () => {
    cursor.style.display = 'none';
    output.textContent = quiet;
    output.classList.remove('live');
  };
  frame.addEventListener('pointermove', (event) => {
    const box = frame.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    let column = Math.min(columns - 1, Math.max(0, Math.floor(x * columns)));
    if (spots) column = spots.reduce((best, spot, i) => Math.abs(spot - 100 * x) < Math.abs(spots[best] - 100 * x) ? i : best, 0);
    show(Math.min(rows - 1, Math.max(0, Math.floor(y * rows))) * columns + column);
  });
  frame.addEventListener('pointerleave', () => { if (document.activeElement !== plot) hide(); });
  plot.addEventListener('focus', () => show(at < 0 ? 0 : at));
  plot.addEventListener('blur', hide);
  plot.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || (rows === 1 && (event.key === 'ArrowDown' || event.key === 'ArrowUp'))) return;
    event.preventDefault();
    if (Number.isFinite(step) && (at + step < 0 || at + step >= says.length)) return;
    show(at + step);
  });
}
const closed = [];
addEventListener('beforeprint', () => {
  for (const details of document.querySelectorAll('details:not([open])')) { details.open = true; closed.push(details); }
});
addEventListener('afterprint', () => { for (const details of closed.splice(0)) details.open = false; });
