/* The check of a grant, with OpenSSL for Ed25519 and cJSON for the claims. */
#include "grant.h"

#include <cjson/cJSON.h>
#include <openssl/evp.h>
#include <openssl/sha.h>
#include <string.h>
#include <time.h>

#define CLOCKS_DIFFER_SEC 30

/* Decodes base64url without padding. Returns the number of bytes, or -1 if the text is wrong or too long. */
int base64url(const char *text, size_t length, unsigned char *out, size_t room) {
    static const char *const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    unsigned bits = 0, held = 0;
    size_t bytes = 0;
    for (size_t i = 0; i < length; i++) {
        const char *digit = text[i] ? strchr(digits, text[i]) : NULL;
        if (!digit) return -1;
        bits = bits << 6 | (unsigned)(digit - digits);
        if ((held += 6) < 8) continue;
        if (bytes == room) return -1;
        out[bytes++] = (unsigned char)(bits >> (held -= 8));
    }
    return (int)bytes;
}

static int is(const cJSON *object, const char *name, const char *wanted) {
    const char *value = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
    return value && strcmp(value, wanted) == 0;
}

static double number(const cJSON *object, const char *name) {
    return cJSON_GetNumberValue(cJSON_GetObjectItemCaseSensitive(object, name)); /* NaN if there is none */
}

static cJSON *part(const char *text, size_t length) {
    unsigned char json[2048];
    int bytes = base64url(text, length, json, sizeof json);
    return bytes < 0 ? NULL : cJSON_ParseWithLength((const char *)json, (size_t)bytes);
}

static int signed_by(const unsigned char key[32], const char *text, size_t length, const unsigned char sign[64]) {
    EVP_PKEY *public_key = EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, NULL, key, 32);
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    int good = public_key && context && EVP_DigestVerifyInit(context, NULL, NULL, NULL, public_key) == 1 &&
               EVP_DigestVerify(context, sign, 64, (const unsigned char *)text, length) == 1;
    EVP_MD_CTX_free(context);
    EVP_PKEY_free(public_key);
    return good;
}

/* begin check */
/* 1 if the grant allows this device exactly this command. `params` is the RFC 8785 form, which the device writes
   itself from the values that it is going to use. `key` is `x` of the JWKS, decoded. */
int granted(const char *grant, const unsigned char key[32], const char *device, const char *id, const char *type,
            const char *params) {
    unsigned char sign[64], hash[32], digest[SHA256_DIGEST_LENGTH];
    const char *claims_at = strchr(grant, '.'), *sign_at = claims_at ? strchr(claims_at + 1, '.') : NULL;
    if (!sign_at || base64url(sign_at + 1, strlen(sign_at + 1), sign, sizeof sign) != 64) return 0;
    if (!signed_by(key, grant, (size_t)(sign_at - grant), sign)) return 0;
    cJSON *header = part(grant, (size_t)(claims_at - grant));
    cJSON *claims = part(claims_at + 1, (size_t)(sign_at - claims_at - 1));
    const char *phs = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(claims, "phs"));
    double now = (double)time(NULL);
    SHA256((const unsigned char *)params, strlen(params), digest);
    int good = is(header, "typ", "grant+jwt") && is(header, "alg", "EdDSA") && is(claims, "iss", "ordain") &&
               is(claims, "aud", device) && is(claims, "sub", id) && is(claims, "cmd", type) &&
               number(claims, "nbf") <= now + CLOCKS_DIFFER_SEC && now < number(claims, "exp") && phs &&
               base64url(phs, strlen(phs), hash, sizeof hash) == 32 && memcmp(hash, digest, 32) == 0;
    cJSON_Delete(header);
    cJSON_Delete(claims);
    return good;
}
/* end check */
