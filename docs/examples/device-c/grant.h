#ifndef GRANT_H
#define GRANT_H

#include <stddef.h>

int base64url(const char *text, size_t length, unsigned char *out, size_t room);
int granted(const char *grant, const unsigned char key[32], const char *device, const char *id, const char *type,
            const char *params);

#endif
