// The points of the map: typed arrays in the order of a grid of cells, so that a view reads only the cells it shows.

const CELLS = 128; // per side
const LEVELS = 65535;

export class Points {
  // From the bytes of /api/map/points: row (uint32), x, y and cluster (uint16), each an array of all points.
  constructor(buffer) {
    const size = buffer.byteLength / 10;
    const rows = new Uint32Array(buffer, 0, size);
    const [xs, ys, clusters] = [4, 6, 8].map((offset) => new Uint16Array(buffer, offset * size, size));
    this.size = size;
    this.starts = new Uint32Array(CELLS * CELLS + 1);
    const cells = new Uint16Array(size);
    for (let i = 0; i < size; i += 1) {
      cells[i] = cellOf(ys[i] / LEVELS) * CELLS + cellOf(xs[i] / LEVELS);
      this.starts[cells[i] + 1] += 1;
    }
    for (let cell = 0; cell < CELLS * CELLS; cell += 1) this.starts[cell + 1] += this.starts[cell];
    const next = this.starts.slice();
    this.rows = new Uint32Array(size);
    this.xs = new Float32Array(size);
    this.ys = new Float32Array(size);
    this.clusters = new Uint16Array(size);
    for (let i = 0; i < size; i += 1) {
      const place = next[cells[i]];
      next[cells[i]] += 1;
      this.rows[place] = rows[i];
      this.xs[place] = xs[i] / LEVELS;
      this.ys[place] = ys[i] / LEVELS;
      this.clusters[place] = clusters[i];
    }
  }

  ranges({ left, top, right, bottom }) {
    // Ranges of points, one per row of cells, that hold all points of a rectangle.
    const found = [];
    for (let y = cellOf(top); y <= cellOf(bottom); y += 1) {
      const start = this.starts[y * CELLS + cellOf(left)];
      const stop = this.starts[y * CELLS + cellOf(right) + 1];
      if (stop > start) found.push([start, stop]);
    }
    return found;
  }

  inside(corners) {
    // Points inside a polygon of [x, y] corners, by the even-odd rule.
    const xs = Float64Array.from(corners, ([x]) => x);
    const ys = Float64Array.from(corners, ([, y]) => y);
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const found = [];
    for (const [start, stop] of this.ranges({ left, top, right, bottom }))
      for (let i = start; i < stop; i += 1) {
        const [x, y] = [this.xs[i], this.ys[i]];
        if (x < left || x > right || y < top || y > bottom) continue;
        let isInside = false;
        for (let a = 0, b = xs.length - 1; a < xs.length; b = a, a += 1)
          if ((ys[a] > y) !== (ys[b] > y) && x < xs[a] + (xs[b] - xs[a]) * (y - ys[a]) / (ys[b] - ys[a])) isInside = !isInside;
        if (isInside) found.push(i);
      }
    return found;
  }

  nearest(x, y, aspect, radius, limit) {
    // Points within a radius (of x; y is scaled by the aspect), nearest first.
    const found = [];
    const high = radius / aspect;
    for (const [start, stop] of this.ranges({ left: x - radius, right: x + radius, top: y - high, bottom: y + high }))
      for (let i = start; i < stop; i += 1) {
        const away = (this.xs[i] - x) ** 2 + ((this.ys[i] - y) * aspect) ** 2;
        if (away <= radius * radius) found.push([away, i]);
      }
    return found.sort((a, b) => a[0] - b[0]).slice(0, limit).map(([, i]) => i);
  }
}

function cellOf(value) {
  return Math.max(0, Math.min(CELLS - 1, Math.floor(value * CELLS)));
}
