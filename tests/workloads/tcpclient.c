// SPDX-License-Identifier: Apache-2.0
/*
 * tcpclient OUTFILE ADDRESS PORT [SECONDS [INTERVAL_US [BYTES]]]: the server's users, and the clock.
 *
 * Keeps one connection, sends a request every INTERVAL_US (0: as soon as the last is answered) and
 * verifies each reply. Never reconnects: a broken connection is a failure. It ends after SECONDS
 * (0: when told by SIGTERM) and prints one JSON object to standard output:
 *
 *	requests, longest_gap_ms, errors, seconds, gaps: [{at_ns, ms}, ...]
 *
 * A gap is the time from sending a request to having its whole reply, where that is above 5 ms;
 * `at_ns` is CLOCK_MONOTONIC when the request was sent. OUTFILE.samples gets one line
 * "SENT_NS RECEIVED_NS" per request.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include "protocol.h"
#include "workload.h"

#define GAPS 1000

static void exchange(int fd, struct message *m, struct message *reply, uint64_t sequence, uint32_t length)
{
	size_t whole = sizeof(*m) + length, done = 0;

	m->sequence = sequence;
	m->served = 0;
	m->length = length;
	for (uint32_t i = 0; i < length; i++)
		m->bytes[i] = wl_mix(sequence * PROTOCOL_MAX + i);
	m->checksum = message_checksum(m);
	while (done < whole) {
		ssize_t n = send(fd, (char *)m + done, whole - done, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		CHECK(n > 0, "request %lu: %s", (long)sequence, strerror(errno));
		done += n;
	}
	for (done = 0; done < whole;) {
		ssize_t n = recv(fd, (char *)reply + done, whole - done, 0);

		if (n < 0 && errno == EINTR)
			continue;
		CHECK(n > 0, "reply %lu: %s", (long)sequence, n ? strerror(errno) : "connection closed");
		done += n;
	}
	CHECK(reply->sequence == sequence && reply->length == length, "reply %lu has number %lu length %u",
	      (long)sequence, (long)reply->sequence, reply->length);
	CHECK(reply->served == sequence, "request %lu counted as %lu", (long)sequence, (long)reply->served);
	CHECK(message_checksum(reply) == reply->checksum, "reply %lu is damaged", (long)sequence);
	for (uint32_t i = 0; i < length; i++)
		CHECK(reply->bytes[i] == (unsigned char)~m->bytes[i], "reply %lu byte %u", (long)sequence, i);
}

static int connect_to(const char *address, const char *port)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST }, *found;
	int error = getaddrinfo(address, port, &hints, &found), fd, one = 1;

	CHECK(!error, "%s: %s", address, gai_strerror(error));
	fd = TRY(socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
	TRY(connect(fd, found->ai_addr, found->ai_addrlen));
	TRY(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)));
	freeaddrinfo(found);
	return fd;
}

int main(int argc, char **argv)
{
	static struct {
		int64_t at, ns;
	} gaps[GAPS];
	int64_t began, last_tick, longest = 0, seconds, interval_us;
	struct message *m = malloc(sizeof(*m) + PROTOCOL_MAX), *reply = malloc(sizeof(*m) + PROTOCOL_MAX);
	uint64_t sequence = 0;
	unsigned long ticks = 0;
	uint32_t bytes;
	FILE *samples;
	int fd, ngaps = 0;

	wl_start(argc, argv);
	CHECK(argc > 3, "usage: tcpclient OUTFILE ADDRESS PORT [SECONDS [INTERVAL_US [BYTES]]]");
	seconds = wl_arg(argc, argv, 4, 0);
	interval_us = wl_arg(argc, argv, 5, 1000);
	bytes = wl_arg(argc, argv, 6, 100);
	CHECK(m && reply && bytes <= PROTOCOL_MAX, "%u bytes", bytes);
	samples = fopen(wl_beside("samples"), "we");
	CHECK(samples, "%s", strerror(errno));
	fd = connect_to(argv[2], argv[3]);
	wl_ready();
	began = last_tick = now_ns();
	while (!wl_stopping && (!seconds || now_ns() - began < seconds * 1000000000)) {
		int64_t sent = now_ns(), received;

		exchange(fd, m, reply, ++sequence, bytes);
		received = now_ns();
		fprintf(samples, "%ld %ld\n", (long)sent, (long)received);
		if (received - sent > longest)
			longest = received - sent;
		if (received - sent > 5000000 && ngaps < GAPS) {
			gaps[ngaps].at = sent;
			gaps[ngaps++].ns = received - sent;
		}
		if (received - last_tick > 100000000) {
			wl_line("tick %lu requests %lu longest_us %ld", ++ticks, (long)sequence, (long)longest / 1000);
			last_tick = received;
		}
		if (interval_us)
			wl_sleep_us(interval_us);
	}
	printf("{\"requests\": %lu, \"longest_gap_ms\": %.3f, \"errors\": 0, \"seconds\": %.3f, \"gaps\": [",
	       (long)sequence, longest / 1e6, (now_ns() - began) / 1e9);
	for (int i = 0; i < ngaps; i++)
		printf("%s{\"at_ns\": %ld, \"ms\": %.3f}", i ? ", " : "", (long)gaps[i].at, gaps[i].ns / 1e6);
	printf("]}\n");
	fflush(stdout);
	fclose(samples);
	wl_ok();
}
