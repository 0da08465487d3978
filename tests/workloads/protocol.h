/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What tcpserver and tcpclient say to each other.
 *
 * A request is a header and `length` bytes; the reply has the same sequence number, the number of
 * requests this connection has seen (`served`: the server's memory of the connection), and the
 * bytes inverted. Both carry a checksum over everything.
 */
#ifndef PROTOCOL_H
#define PROTOCOL_H

#include <stddef.h>
#include <stdint.h>

#define PROTOCOL_MAX 65536

struct message {
	uint64_t sequence;
	uint64_t served;
	uint32_t length;
	uint32_t checksum;
	unsigned char bytes[];
};

/* FNV-1a over the header (its checksum as zero) and the bytes. */
static inline uint32_t message_checksum(const struct message *m)
{
	const unsigned char *p = (const unsigned char *)m;
	uint32_t sum = 2166136261u;

	for (size_t i = 0; i < offsetof(struct message, checksum); i++)
		sum = (sum ^ p[i]) * 16777619u;
	for (size_t i = 0; i < m->length; i++)
		sum = (sum ^ m->bytes[i]) * 16777619u;
	return sum;
}

#endif
