// A long list, newest first, of which only parts are in memory. It is read page by page; what arrives live is
// put in front; rows that were not looked at for longest are let go and read again when they are wanted.

const PAGE = 100;
export const MOST_ROWS = 20_000;
const SPLIT_AT = 500; // live rows, before a cursor is asked for from which they could be read again

/**
 * A block: `cursor` reads it (null: the newest, undefined: cannot be read again yet), `rows` or null if let
 * go, `count`, `first`: the id of its first row.
 */
export class Blocks {
  /** `read(cursor, limit, signal)` gives a page of the API with rows; `changed` is called after each change. */
  constructor(read, changed) {
    this.read = read;
    this.changed = changed;
    this.stop = new AbortController();
    this.known = new Map(); // id → row, of those in memory
    this.blocks = [{ cursor: undefined, rows: [], count: 0, used: 0 }];
    this.total = 0;
    this.next = null; // the cursor of what follows the last block
    this.complete = false;
    this.started = false;
    this.error = null;
    this.above = 0; // rows put in front so far, so that a view can stand still
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

  /** Says which rows are looked at: they are read if they are not here, and what follows soon is too. */
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

  /** Reads a block that was let go. Rows may have left the list meanwhile; its neighbour's rows end it. */
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

  /** Reads what is looked at again, and what is new, where no events tell. */
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

  /** A row that has just come to be. */
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

  /** A row that came to fit the list later, put where it belongs by when it was created. */
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

  /** Finds a cursor for what came live, so that it can be let go like the rest. */
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
      // The next row that comes tries again.
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
