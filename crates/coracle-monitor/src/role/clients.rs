//! The monitor's clients: what each wants, and what it has not taken yet.
//!
//! A message goes out at once or is queued. A client that applies back-pressure has at most one chunk queued while
//! the container runs, because nothing more is read from the container until it is gone; any other client is
//! dropped once it is [`ATTACH_BYTES_MAX`] behind.
//!
//! Invariant: what a client gets is in order and whole; a client that vanishes holds nobody up.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_sys::socket::{self, Wait};
use rustix::event::epoll::{self, EventData, EventFlags};

use super::Token;
use crate::protocol::{ATTACH_BYTES_MAX, Attach, HEAD_BYTES, Stream, output_head};

/// Most clients at a time.
const CLIENTS_MAX: usize = 256;

/// One connection.
#[derive(Debug)]
pub(super) struct Client {
    socket: OwnedFd,
    wants: Attach,
    /// It asked for something that the container's end answers.
    pub(super) exec: bool,
    queue: VecDeque<Vec<u8>>,
    queued: usize,
}

/// All connections. Their slots are reused.
#[derive(Debug, Default)]
pub(super) struct Clients {
    slots: Vec<Option<Client>>,
}

impl Clients {
    /// Takes a connection in; one too many is closed.
    pub(super) fn add(&mut self, epoll: &OwnedFd, socket: OwnedFd) -> io::Result<Option<usize>> {
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if free >= CLIENTS_MAX {
            return Ok(None);
        }
        epoll::add(epoll, &socket, EventData::new_u64(Token::Client(free).encode()), EventFlags::IN)?;
        let client =
            Client { socket, wants: Attach::default(), exec: false, queue: VecDeque::new(), queued: 0 };
        match self.slots.get_mut(free) {
            Some(slot) => *slot = Some(client),
            None => self.slots.push(Some(client)),
        }
        Ok(Some(free))
    }

    /// The socket of a client.
    pub(super) fn socket(&self, at: usize) -> Option<BorrowedFd<'_>> {
        self.get(at).map(|c| c.socket.as_fd())
    }

    /// What a client attached to.
    pub(super) fn wants(&self, at: usize) -> Option<Attach> {
        self.get(at).map(|c| c.wants)
    }

    /// Sets what a client wants.
    pub(super) fn set_wants(&mut self, at: usize, wants: Attach) {
        if let Some(Some(client)) = self.slots.get_mut(at) {
            client.wants = wants;
        }
    }

    /// Makes a client one that waits for a process of its own, not for the container.
    pub(super) fn set_exec(&mut self, at: usize) {
        if let Some(Some(client)) = self.slots.get_mut(at) {
            client.exec = true;
        }
    }

    /// Whether a client waits for a process of its own.
    pub(super) fn is_exec(&self, at: usize) -> bool {
        self.get(at).is_some_and(|c| c.exec)
    }

    fn get(&self, at: usize) -> Option<&Client> {
        self.slots.get(at).and_then(Option::as_ref)
    }

    /// Closes a connection.
    pub(super) fn drop(&mut self, at: usize) {
        if let Some(slot) = self.slots.get_mut(at) {
            // Closing takes it out of the epoll set.
            *slot = None;
        }
    }

    /// Numbers of all clients.
    pub(super) fn all(&self) -> Vec<usize> {
        (0..self.slots.len()).filter(|&at| self.get(at).is_some()).collect()
    }

    /// Whether one that cleans up after the container is connected.
    pub(super) fn has_owner(&self) -> bool {
        self.slots.iter().flatten().any(|c| c.wants.own)
    }

    /// Whether the container has to wait for a client that applies back-pressure.
    pub(super) fn is_blocked(&self) -> bool {
        self.slots.iter().flatten().any(|c| c.wants.throttle && !c.queue.is_empty())
    }

    /// Whether a client has not taken all that is for it.
    pub(super) fn has_queued(&self) -> bool {
        self.slots.iter().flatten().any(|c| !c.queue.is_empty())
    }

    /// Gives a chunk of output to all who want it.
    pub(super) fn output(&mut self, epoll: &OwnedFd, stream: Stream, chunk: &[u8]) {
        let head = output_head(stream);
        for at in 0..self.slots.len() {
            let wants = self.wants(at).is_some_and(|w| match stream {
                Stream::Stdout => w.stdout,
                Stream::Stderr => w.stderr,
            });
            if wants {
                self.send_parts(epoll, at, &head, chunk);
            }
        }
    }

    /// Gives a message to one client.
    pub(super) fn send(&mut self, epoll: &OwnedFd, at: usize, message: &[u8]) {
        let (head, rest) = message.split_at(HEAD_BYTES.min(message.len()));
        self.send_parts(epoll, at, head, rest);
    }

    /// Gives a message with a descriptor to one client. Descriptors are not queued: a client that gets one has
    /// just asked for it and reads the answer.
    pub(super) fn send_with(
        &mut self,
        epoll: &OwnedFd,
        at: usize,
        message: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) {
        let (Some(fd), Some(client)) = (fd, self.get(at)) else { return self.send(epoll, at, message) };
        let parts = [IoSlice::new(message)];
        if !client.queue.is_empty()
            || socket::send(client.socket.as_fd(), &parts, &[fd], Wait::Never).is_err()
        {
            self.drop(at);
        }
    }

    fn send_parts(&mut self, epoll: &OwnedFd, at: usize, head: &[u8], rest: &[u8]) {
        let Some(Some(client)) = self.slots.get_mut(at) else { return };
        let len = head.len() + rest.len();
        if client.queue.is_empty() {
            let parts = [IoSlice::new(head), IoSlice::new(rest)];
            match socket::send(client.socket.as_fd(), &parts, &[], Wait::Never) {
                Ok(()) => return,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_gone) => return self.drop(at),
            }
        }
        if !client.wants.throttle && client.queued + len > ATTACH_BYTES_MAX {
            return self.drop(at);
        }
        client.queue.push_back([head, rest].concat());
        client.queued += len;
        if client.queue.len() == 1 && watch(epoll, client, at, EventFlags::IN | EventFlags::OUT).is_err() {
            self.drop(at);
        }
    }

    /// Sends what is queued for a client as far as it takes it.
    pub(super) fn flush(&mut self, epoll: &OwnedFd, at: usize) {
        let Some(Some(client)) = self.slots.get_mut(at) else { return };
        while let Some(message) = client.queue.front() {
            match socket::send(client.socket.as_fd(), &[IoSlice::new(message)], &[], Wait::Never) {
                Ok(()) => {
                    client.queued = client.queued.saturating_sub(message.len());
                    client.queue.pop_front();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_gone) => return self.drop(at),
            }
        }
        client.queue = VecDeque::new();
        if watch(epoll, client, at, EventFlags::IN).is_err() {
            self.drop(at);
        }
    }
}

fn watch(epoll: &OwnedFd, client: &Client, at: usize, flags: EventFlags) -> io::Result<()> {
    Ok(epoll::modify(epoll, &client.socket, EventData::new_u64(Token::Client(at).encode()), flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::epoll::CreateFlags;

    struct Side {
        epoll: OwnedFd,
        clients: Clients,
        at: usize,
        peer: OwnedFd,
    }

    fn side(wants: Attach) -> Side {
        let epoll = epoll::create(CreateFlags::CLOEXEC).unwrap();
        let (peer, socket) = socket::pair().unwrap();
        let mut clients = Clients::default();
        let at = clients.add(&epoll, socket).unwrap().unwrap();
        clients.set_wants(at, wants);
        Side { epoll, clients, at, peer }
    }

    /// Receives everything that is there now, sending on as room appears.
    fn receive_all(side: &mut Side) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buffer = vec![0; 1 << 17];
        while let Ok(got) = socket::receive(side.peer.as_fd(), &mut buffer, Wait::Never) {
            if got.len == 0 {
                break;
            }
            all.extend(&buffer[3..got.len]);
            side.clients.flush(&side.epoll, side.at);
        }
        all
    }

    #[test]
    fn a_throttling_client_blocks_the_container_and_loses_nothing() {
        let mut side = side(Attach { stdout: true, throttle: true, ..Attach::default() });
        let mut sent = Vec::new();
        for n in 0_u8..=255 {
            let chunk = vec![n; 16 << 10];
            side.clients.output(&side.epoll, Stream::Stdout, &chunk);
            sent.extend(chunk);
        }
        side.clients.output(&side.epoll, Stream::Stderr, b"not asked for");
        assert!(side.clients.is_blocked());
        assert!(receive_all(&mut side) == sent);
        assert!(!side.clients.is_blocked() && !side.clients.has_queued());
    }

    #[test]
    fn another_client_is_dropped_when_it_falls_behind() {
        let mut side = side(Attach { stderr: true, ..Attach::default() });
        let chunk = vec![b'x'; 16 << 10];
        let mut taken = 0;
        while side.clients.socket(side.at).is_some() {
            side.clients.output(&side.epoll, Stream::Stderr, &chunk);
            assert!(!side.clients.is_blocked());
            taken += chunk.len();
            assert!(taken < 4 << 20, "never dropped");
        }
        assert!(taken > ATTACH_BYTES_MAX);
        assert!(side.clients.all().is_empty() && !side.clients.has_queued());
    }

    #[test]
    fn a_vanished_client_holds_nobody_up() {
        let mut side = side(Attach { stdout: true, throttle: true, own: true, ..Attach::default() });
        assert!(side.clients.has_owner());
        while !side.clients.is_blocked() {
            side.clients.output(&side.epoll, Stream::Stdout, &[1; 16 << 10]);
        }
        side.peer = socket::pair().unwrap().0;
        side.clients.flush(&side.epoll, side.at);
        assert!(!side.clients.is_blocked() && !side.clients.has_owner());
        let (_peer, socket) = socket::pair().unwrap();
        assert_eq!(side.clients.add(&side.epoll, socket).unwrap(), Some(side.at), "its slot is free again");
    }
}
