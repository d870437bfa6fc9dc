/* A door in C with libmosquitto: it unlocks, and refuses commands without a valid grant.
   Environment: TOKEN, ORDAIN_KEY (`x` of /.well-known/jwks.json), DEVICE, MQTT_HOST, MQTT_PORT. */
#include "grant.h"

#include <cjson/cJSON.h>
#include <mosquitto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REMEMBERED 16
#define ROOM 512

/* The last answer to each id. If an id comes again, its answer is sent and nothing is executed. If a command must
   not be executed twice, keep this in flash, so that it survives a restart. */
static struct { char id[65], answer[ROOM]; } memory[REMEMBERED];
static unsigned next;

static const char *device;
static unsigned char key[32];

static const char *topic(const char *suffix) {
    static char text[128];
    snprintf(text, sizeof text, "iotee/dev/%s/%s", device, suffix);
    return text;
}

/* libmosquitto keeps an answer without PUBACK and publishes it again after a reconnect. */
static void say(struct mosquitto *client, const char *answer) {
    mosquitto_publish(client, NULL, topic("ack"), (int)strlen(answer), answer, 1, false);
}

static const char *text(const cJSON *command, const char *name) {
    const char *found = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(command, name));
    return found ? found : "";
}

static void execute(struct mosquitto *client, const cJSON *command, char answer[ROOM]) {
    const char *id = text(command, "id"), *type = text(command, "type");
    const cJSON *given = cJSON_GetObjectItemCaseSensitive(command, "params");
    const cJSON *for_sec = cJSON_GetObjectItemCaseSensitive(given, "for_sec");
    char params[64] = "{}"; /* the RFC 8785 form of the parameters that this command has */
    if (cJSON_IsNumber(for_sec)) snprintf(params, sizeof params, "{\"for_sec\":%d}", for_sec->valueint);

    if (!granted(text(command, "grant"), key, device, id, type, params)) {
        snprintf(answer, ROOM, "{\"id\":\"%s\",\"status\":\"failed\",\"error\":{\"code\":\"grant_refused\","
                 "\"message\":\"the grant does not allow this\"}}", id);
        return;
    }
    snprintf(answer, ROOM, "{\"id\":\"%s\",\"status\":\"acknowledged\"}", id);
    say(client, answer);
    if (strcmp(type, "unlock") != 0) {
        snprintf(answer, ROOM, "{\"id\":\"%s\",\"status\":\"failed\",\"error\":{\"code\":\"unknown_command\","
                 "\"message\":\"%s\"}}", id, type);
    } else {
        printf("unlock %s\n", id);
        fflush(stdout);
        snprintf(answer, ROOM, "{\"id\":\"%s\",\"status\":\"executed\",\"result\":{\"locked\":false}}", id);
    }
    snprintf(memory[next].id, sizeof memory[next].id, "%s", id);
    snprintf(memory[next].answer, ROOM, "%s", answer);
    next = (next + 1) % REMEMBERED;
}

/* Whether a text is an identifier of Ordain. Other texts must not get into an answer. */
static int is_name(const char *id) {
    static const char *const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-";
    size_t length = strlen(id);
    return length > 0 && length <= 64 && strspn(id, allowed) == length;
}

static void on_message(struct mosquitto *client, void *unused, const struct mosquitto_message *message) {
    (void)unused;
    cJSON *command = cJSON_ParseWithLength(message->payload, (size_t)message->payloadlen);
    const char *id = text(command, "id");
    char answer[ROOM] = "";
    if (is_name(id) && is_name(text(command, "type"))) {
        for (unsigned i = 0; i < REMEMBERED; i++)
            if (strcmp(memory[i].id, id) == 0) snprintf(answer, ROOM, "%s", memory[i].answer);
        if (!*answer) execute(client, command, answer);
        say(client, answer);
    }
    cJSON_Delete(command);
}

static void on_connect(struct mosquitto *client, void *unused, int refused) {
    (void)unused;
    if (refused) fprintf(stderr, "%s\n", mosquitto_connack_string(refused));
    else mosquitto_subscribe(client, NULL, topic("rls"), 1);
}

/* Called after the SUBACK. Only now say `online`: the device gets every command that is sent from here on. */
static void on_subscribe(struct mosquitto *client, void *unused, int id, int count, const int *granted_qos) {
    (void)unused, (void)id, (void)count, (void)granted_qos;
    mosquitto_publish(client, NULL, topic("status"), 6, "online", 1, true);
}

static const char *setting(const char *name, const char *otherwise) {
    const char *found = getenv(name);
    if (!found && !otherwise) {
        fprintf(stderr, "set %s\n", name);
        exit(2);
    }
    return found ? found : otherwise;
}

int main(void) {
    device = setting("DEVICE", "door-7");
    const char *x = setting("ORDAIN_KEY", NULL);
    if (base64url(x, strlen(x), key, sizeof key) != 32) {
        fprintf(stderr, "ORDAIN_KEY must be the x of an Ed25519 key\n");
        return 2;
    }
    mosquitto_lib_init();
    struct mosquitto *client = mosquitto_new(device, true, NULL);
    mosquitto_username_pw_set(client, device, setting("TOKEN", NULL));
    mosquitto_will_set(client, topic("status"), 7, "offline", 1, true);
    mosquitto_int_option(client, MOSQ_OPT_TCP_NODELAY, 1);
    mosquitto_connect_callback_set(client, on_connect);
    mosquitto_subscribe_callback_set(client, on_subscribe);
    mosquitto_message_callback_set(client, on_message);
    if (mosquitto_connect(client, setting("MQTT_HOST", "127.0.0.1"), atoi(setting("MQTT_PORT", "1883")), 15)) {
        perror("connect");
        return 1;
    }
    return mosquitto_loop_forever(client, -1, 1);
}
