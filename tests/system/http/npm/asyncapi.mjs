// Reads an AsyncAPI document from standard input with the official parser, and prints its faults as JSON.

import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";

const { document, diagnostics } = await new Parser().parse(readFileSync(0, "utf8"));
const faults = diagnostics.filter(({ severity }) => severity === 0).map(({ message, path }) => [path.join("/"), message]);
console.log(JSON.stringify({ read: document !== undefined, faults }));
