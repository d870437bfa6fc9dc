// The check of a grant with `jose`.
import { createHash } from "node:crypto";
import { jwtVerify } from "jose";

// begin check
/** The RFC 8785 form of a JSON value: sorted keys, no spaces; JavaScript writes numbers and texts as the RFC wants. */
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.keys(value).sort().map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`).join(",")}}`;
}

/** Rejects unless the grant allows this device exactly this command. `keys` is what `createRemoteJWKSet` returns. */
export async function check(grant, command, hardwareId, keys) {
  const { payload } = await jwtVerify(grant, keys, {
    algorithms: ["EdDSA"], typ: "grant+jwt", issuer: "ordain", audience: hardwareId,
    requiredClaims: ["exp", "nbf", "sub", "cmd", "phs"],
  });
  const phs = createHash("sha256").update(canonical(command.params)).digest("base64url");
  if (payload.sub !== command.id || payload.cmd !== command.type || payload.phs !== phs)
    throw new Error("the grant is for another command");
}
// end check
