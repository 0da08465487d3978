// SPDX-License-Identifier: Apache-2.0
/*
 * tcpserver OUTFILE ADDRESS PORT [MEMORY_MIB]: an echo server with a memory of each connection.
 *
 * IPv4 or IPv6. One thread, epoll. Every request is verified and answered with the number of
 * requests seen on its connection. A connection that breaks is an ordinary event here; that it
 * must not break is the client's to check.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "protocol.h"
#include "workload.h"

struct connection {
	int fd;
	uint64_t served;
	size_t have, unsent;
	unsigned char in[sizeof(struct message) + PROTOCOL_MAX];
	unsigned char out[sizeof(struct message) + PROTOCOL_MAX];
};

static int epoll;

static void watch(struct connection *c)
{
	struct epoll_event event = { .events = c->unsent ? EPOLLOUT : EPOLLIN, .data.ptr = c };

	TRY(epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event));
}

static int flush(struct connection *c)
{
	while (c->unsent) {
		ssize_t n = send(c->fd, c->out, c->unsent, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN ? 0 : -1;
		memmove(c->out, c->out + n, c->unsent - n);
		c->unsent -= n;
	}
	return 0;
}

/* Answers one complete request. One reply at a time is in `out`: the next waits in `in`. */
static int answer(struct connection *c)
{
	struct message *request = (struct message *)c->in, *reply = (struct message *)c->out;
	size_t whole;

	if (c->unsent || c->have < sizeof(*request))
		return 0;
	CHECK(request->length <= PROTOCOL_MAX, "length %u", request->length);
	whole = sizeof(*request) + request->length;
	if (c->have < whole)
		return 0;
	CHECK(message_checksum(request) == request->checksum, "request %lu is damaged",
	      (long)request->sequence);
	*reply = *request;
	reply->served = ++c->served;
	for (size_t i = 0; i < request->length; i++)
		reply->bytes[i] = ~request->bytes[i];
	reply->checksum = message_checksum(reply);
	c->unsent = whole;
	c->have -= whole;
	memmove(c->in, c->in + whole, c->have);
	return 1;
}

static int serve(struct connection *c)
{
	int was_unsent = c->unsent > 0, closed = 0;
	uint64_t served = c->served;

	if (flush(c) < 0)
		return -1;
	while (c->have < sizeof(c->in)) {
		ssize_t n = recv(c->fd, c->in + c->have, sizeof(c->in) - c->have, 0);

		if (n < 0 && errno == EINTR)
			continue;
		closed = n == 0 || (n < 0 && errno != EAGAIN);
		if (n <= 0)
			break;
		c->have += n;
	}
	while (answer(c) > 0)
		if (flush(c) < 0)
			return -1;
	if (closed)
		return -1;
	if (was_unsent != (c->unsent > 0))
		watch(c);
	return c->served - served;
}

static int listen_at(const char *address, const char *port)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICHOST }, *found;
	int error = getaddrinfo(address, port, &hints, &found), fd, one = 1;

	CHECK(!error, "%s: %s", address, gai_strerror(error));
	fd = TRY(socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
	TRY(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)));
	TRY(bind(fd, found->ai_addr, found->ai_addrlen));
	TRY(listen(fd, 64));
	freeaddrinfo(found);
	return fd;
}

int main(int argc, char **argv)
{
	uint64_t served = 0;
	int64_t last = 0;
	unsigned long ticks = 0, connections = 0;
	struct epoll_event event = { .events = EPOLLIN };
	int listener, one = 1;
	long mib;

	wl_start(argc, argv);
	CHECK(argc > 3, "usage: tcpserver OUTFILE ADDRESS PORT [MEMORY_MIB]");
	mib = wl_arg(argc, argv, 4, 0);
	if (mib) {
		uint64_t *words = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		CHECK(words != MAP_FAILED, "%s", strerror(errno));
		for (long i = 0; i < mib << 17; i++)
			words[i] = wl_mix(i) & 0xffffffff;
	}
	listener = listen_at(argv[2], argv[3]);
	epoll = TRY(epoll_create1(EPOLL_CLOEXEC));
	TRY(epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event));
	wl_ready();
	while (!wl_stopping) {
		int n = epoll_wait(epoll, &event, 1, 100);
		struct connection *c = event.data.ptr;

		if (n < 0)
			CHECK(errno == EINTR, "epoll_wait: %s", strerror(errno));
		if (n > 0 && !c) {
			int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

			if (fd < 0)
				continue;
			TRY(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)));
			c = calloc(1, sizeof(*c));
			CHECK(c, "memory");
			c->fd = fd;
			event = (struct epoll_event){ .events = EPOLLIN, .data.ptr = c };
			TRY(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
			connections++;
		} else if (n > 0) {
			int done = serve(c);

			if (done < 0) {
				close(c->fd);
				free(c);
				connections--;
			} else {
				served += done;
			}
		}
		if (now_ns() - last > 100000000) {
			wl_line("tick %lu served %lu connections %lu", ++ticks, (long)served, connections);
			last = now_ns();
		}
	}
	wl_ok();
}
