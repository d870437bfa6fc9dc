// A long list, newest first, of which only parts are in memory. It is read page by page. Rows that arrive live
// are added at the top. When there are too many, the rows that were not shown for the longest time are dropped,
// and read again when they are shown again.

const PAGE = 100;
export const MOST_ROWS = 20_000;
const SPLIT_AT = 500; // so many live rows get a cursor, so that they can be dropped and read again

/**
 * A block: `cursor` reads it (null: from the newest row; undefined: it cannot be read again yet), `rows` (null
 * if dropped), `count` of rows, `first`: the id of its first row.
 */
export class Blocks {
  /** `read(cursor, limit, signal)` returns a page of the API with rows. `changed` is called after each read. */
  constructor(read, changed) {
    this.read = read;
    this.changed = changed;
    this.stop = new AbortController();
    this.known = new Map(); // id → row, for the rows in memory
    this.blocks = [{ cursor: undefined, rows: [], count: 0, used: 0 }];
    this.total = 0;
    this.next = null; // the cursor that reads the rows after the last block
    this.complete = false;
    this.started = false;
    this.error = null;
    this.above = 0; // rows added at the top so far; the view scrolls by as many, so that nothing moves
    this.uses = 0;
    this.busy = false;
    this.splitting = false;
    this.range = [0, 0];
  }

  close() {
    this.stop.abort();
  }

  /** The row at an index; null while it is not in memory. */
  at(index) {
    for (const block of this.blocks) {
      if (index < block.count) return block.rows?.[index] ?? null;
      index -= block.count;
    }
    return null;
  }

  indexOf(id) {
    const row = this.known.get(id);
    let before = 0;
    for (const block of this.blocks) {
      const found = block.rows && row ? block.rows.indexOf(row) : -1;
      if (found >= 0) return before + found;
      before += block.count;
    }
    return -1;
  }

  /** Tells which rows are shown. Reads them if they are not in memory, and reads ahead near the end. */
  want(first, last) {
    this.range = [first, last];
    let before = 0;
    for (const block of this.blocks) {
      if (before <= last && before + block.count >= first) {
        block.used = ++this.uses;
        if (block.rows === null) this.#run(() => this.#again(block));
      }
      before += block.count;
    }
    if (!this.complete && last > this.total - 3 * PAGE) this.#run(() => this.#more());
  }

  async #run(work) {
    if (this.busy || (this.error && Date.now() < this.retryAt)) return;
    this.busy = true;
    try {
      await work();
      this.error = null;
    } catch (error) {
      if (this.stop.signal.aborted) return;
      this.error = error;
      this.retryAt = Date.now() + 2_000;
    } finally {
      this.busy = false;
    }
    this.started = true;
    this.changed();
  }

  async #more() {
    const cursor = this.next;
    const page = await this.read(cursor, PAGE, this.stop.signal);
    const rows = page.data.filter((row) => !this.known.has(row.id));
    for (const row of rows) this.known.set(row.id, row);
    if (rows.length) {
      this.blocks.push({ cursor: cursor ?? undefined, rows, count: rows.length, first: rows[0].id, used: ++this.uses });
      this.total += rows.length;
    }
    this.next = page.next_cursor;
    this.complete = page.next_cursor === null;
    this.#letGo();
  }

  /** Reads a dropped block again. Rows may have left the list meanwhile; it ends where the next block begins. */
  async #again(block) {
    const following = this.blocks[this.blocks.indexOf(block) + 1]?.first;
    const rows = [];
    let cursor = block.cursor;
    while (cursor !== null && rows.length < block.count) {
      const page = await this.read(cursor, PAGE, this.stop.signal);
      const end = page.data.findIndex((row) => row.id === following);
      rows.push(...(end < 0 ? page.data : page.data.slice(0, end)));
      cursor = end < 0 ? page.next_cursor : null;
    }
    block.rows = rows.slice(0, block.count).filter((row) => !this.known.has(row.id));
    for (const row of block.rows) this.known.set(row.id, row);
    this.total += block.rows.length - block.count;
    block.count = block.rows.length;
    this.#letGo();
  }

  /** Reads the newest rows and the shown rows again. Used when the key may not follow events. */
  refresh() {
    this.#run(async () => {
      const [first, last] = this.range;
      const newest = await this.read(null, PAGE, this.stop.signal);
      for (const row of newest.data.reverse()) this.#renew(row, true);
      let before = 0;
      for (const block of [...this.blocks]) {
        const seen = before <= last && before + block.count >= first && block.rows && block.cursor;
        before += block.count;
        if (!seen) continue;
        const page = await this.read(block.cursor, PAGE, this.stop.signal);
        for (const row of page.data) this.#renew(row, false);
      }
    });
  }

  #renew(row, isNew) {
    const known = this.known.get(row.id);
    if (known) Object.assign(known, row, { v: known.v + 1 });
    else if (isNew) this.insert(row);
  }

  /** Adds the row of a new command at the top. */
  insert(row) {
    if (this.known.has(row.id)) return;
    const [head] = this.blocks;
    head.rows.unshift(row);
    head.first = row.id;
    head.count += 1;
    head.used = ++this.uses;
    this.known.set(row.id, row);
    this.total += 1;
    this.above += 1;
    if (head.count >= SPLIT_AT) this.#split();
  }

  /** Adds an older row that fits the filters only now, in order of creation. */
  place(row) {
    if (this.known.has(row.id)) return;
    let before = 0;
    for (const block of this.blocks) {
      const found = block.rows?.findIndex((other) => other.created <= row.created) ?? -1;
      const last = block === this.blocks.at(-1);
      if (found >= 0 || (last && this.complete && block.rows)) {
        const index = found >= 0 ? found : block.count;
        block.rows.splice(index, 0, row);
        block.count += 1;
        block.first = block.rows[0].id;
        this.known.set(row.id, row);
        this.total += 1;
        if (before + index === 0) this.above += 1;
        return;
      }
      before += block.count;
    }
  }

  remove(id) {
    const row = this.known.get(id);
    const block = row && this.blocks.find((each) => each.rows?.includes(row));
    if (!block) return;
    block.rows.splice(block.rows.indexOf(row), 1);
    block.count -= 1;
    block.first = block.rows[0]?.id;
    this.known.delete(id);
    this.total -= 1;
  }

  /** Gets a cursor for the live rows, so that they can be dropped like other rows. */
  async #split() {
    if (this.splitting) return;
    this.splitting = true;
    try {
      const page = await this.read(null, 1, this.stop.signal);
      const [head] = this.blocks;
      const place = head.rows.findIndex((row) => row.id === page.data[0]?.id);
      if (place < 0 || page.next_cursor === null) return;
      const rows = head.rows.splice(place + 1);
      head.count = head.rows.length;
      const block = { cursor: page.next_cursor, rows, count: rows.length, first: rows[0]?.id, used: head.used };
      if (rows.length) this.blocks.splice(1, 0, block);
      this.#letGo();
    } catch {
      // The next live row tries again.
    } finally {
      this.splitting = false;
    }
  }

  #letGo() {
    while (this.known.size > MOST_ROWS) {
      const able = this.blocks.filter((block) => block.rows?.length && block.cursor !== undefined);
      if (able.length < 2) return;
      const oldest = able.reduce((one, other) => (other.used < one.used ? other : one));
      for (const row of oldest.rows) this.known.delete(row.id);
      oldest.rows = null;
    }
  }
}
