//! Against a service manager made here, which speaks the protocol over a socket pair and keeps what it was told,
//! and against the distribution's message bus.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use super::wire::{HEAD_BYTES, Message};
use super::*;

/// Answers calls until the client goes; the calls it got.
struct Fake {
    stream: UnixStream,
    /// The result of jobs, or the error with which a method is refused the first time.
    result: &'static str,
    refuses: Option<(&'static str, &'static str)>,
}

impl Fake {
    fn serve(mut self) -> Vec<Message> {
        let mut line = [0; 64];
        let n = self.stream.read(&mut line).unwrap();
        assert_eq!(&line[..n], b"\0AUTH EXTERNAL 30\r\n");
        self.stream.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n").unwrap();
        let mut begin = [0; 7];
        self.stream.read_exact(&mut begin).unwrap();
        assert_eq!(&begin, b"BEGIN\r\n");
        let mut calls = Vec::new();
        while let Some(call) = self.receive() {
            self.answer(&call);
            calls.push(call);
        }
        calls
    }

    fn receive(&mut self) -> Option<Message> {
        let mut bytes = vec![0; HEAD_BYTES];
        self.stream.read_exact(&mut bytes).ok()?;
        bytes.resize(wire::length(&bytes).unwrap(), 0);
        self.stream.read_exact(&mut bytes[HEAD_BYTES..]).unwrap();
        Some(wire::parse(&bytes).unwrap())
    }

    fn answer(&mut self, call: &Message) {
        let mut body = Writer::default();
        if let Some((member, error)) = self.refuses
            && member == call.member
        {
            self.refuses = None;
            body.text("not so").unwrap();
            return self.send(wire::ERROR, call, error, &body.into_bytes());
        }
        let is_job = ["StartTransientUnit", "StopUnit"].contains(&call.member.as_str());
        if is_job {
            // Another's job, and ours, before the answer: as it happens.
            for job in ["/job/1", "/job/7"] {
                let mut signal = Writer::default();
                signal.u32(7);
                signal.text(job).unwrap();
                signal.text("x.scope").unwrap();
                signal.text(self.result).unwrap();
                self.send(wire::SIGNAL, call, "JobRemoved", &signal.into_bytes());
            }
        }
        body.text(if is_job { "/job/7" } else { ":1.7" }).unwrap();
        self.send(wire::RETURN, call, "", &body.into_bytes());
    }

    /// `name`: of a signal's member or of an error.
    fn send(&mut self, kind: u8, call: &Message, name: &str, body: &[u8]) {
        let mut head = vec![if cfg!(target_endian = "little") { b'l' } else { b'B' }, kind, 0, 1];
        head.extend(u32::try_from(body.len()).unwrap().to_ne_bytes());
        head.extend(1_u32.to_ne_bytes());
        let mut fields = Vec::new();
        if kind != wire::SIGNAL {
            fields.extend([5, 1, b'u', 0]);
            fields.extend(call.serial.to_ne_bytes());
        }
        if !name.is_empty() {
            fields.extend([if kind == wire::SIGNAL { 3 } else { 4 }, 1, b's', 0]);
            fields.extend(u32::try_from(name.len()).unwrap().to_ne_bytes());
            fields.extend(name.as_bytes());
            fields.push(0);
        }
        head.extend(u32::try_from(fields.len()).unwrap().to_ne_bytes());
        head.extend(fields);
        head.resize(head.len().next_multiple_of(8), 0);
        head.extend(body);
        self.stream.write_all(&head).unwrap();
    }
}

fn manager(
    result: &'static str,
    refuses: Option<(&'static str, &'static str)>,
) -> (Manager, JoinHandle<Vec<Message>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fake = Fake { stream: theirs, result, refuses };
    let served = std::thread::spawn(|| fake.serve());
    (Manager { bus: Bus::over(ours, 0).unwrap() }, served)
}

fn unit() -> Unit {
    let annotations =
        BTreeMap::from([("org.systemd.property.TimeoutStopSec".to_owned(), "uint64 3".to_owned())]);
    Unit { name: "coracle-x.scope".to_owned(), slice: "machine.slice".to_owned(), annotations }
}

fn members(calls: &[Message]) -> Vec<&str> {
    calls.iter().map(|call| call.member.as_str()).collect()
}

#[test]
fn a_scope_is_started_with_its_limits() {
    let (mut manager, served) = manager("done", None);
    manager.start(&unit(), 4711, vec![("MemoryMax".to_owned(), Value::U64(1 << 20))]).unwrap();
    drop(manager);
    let calls = served.join().unwrap();
    assert_eq!(members(&calls), ["Hello", "AddMatch", "Subscribe", "StartTransientUnit"]);
    let body = &calls[3].body;
    let mut reader = Reader::new(body);
    assert_eq!(reader.text().unwrap(), "coracle-x.scope");
    assert_eq!(reader.text().unwrap(), "replace");
    assert!(reader.u32().unwrap() > 100, "bytes of properties");
    let mut found = Vec::new();
    for _ in 0..11 {
        reader.align(8);
        let (name, signature) = (reader.text().unwrap(), reader.signature().unwrap());
        let value = match signature.as_str() {
            "s" => reader.text().unwrap(),
            "b" => reader.u32().unwrap().to_string(),
            "au" => {
                assert_eq!(reader.u32().unwrap(), 4);
                reader.u32().unwrap().to_string()
            }
            "t" => {
                reader.align(8);
                let low = reader.u32().unwrap();
                assert_eq!(reader.u32().unwrap(), 0);
                low.to_string()
            }
            other => panic!("{other}"),
        };
        found.push(format!("{name}={value}"));
    }
    for expected in
        ["Slice=machine.slice", "Delegate=1", "PIDs=4711", "MemoryMax=1048576", "TimeoutStopUSec=3000000"]
    {
        assert!(found.contains(&expected.to_owned()), "{expected}: {found:?}");
    }
}

#[test]
fn a_unit_that_failed_before_is_forgotten_first() {
    let (mut manager, served) = manager("done", Some(("StartTransientUnit", UNIT_EXISTS)));
    manager.start(&unit(), 1, Vec::new()).unwrap();
    drop(manager);
    let calls = served.join().unwrap();
    assert_eq!(members(&calls)[3..], ["StartTransientUnit", "ResetFailedUnit", "StartTransientUnit"]);
}

#[test]
fn a_job_that_fails_is_an_error_with_its_result() {
    let (mut manager, served) = manager("dependency", None);
    let error = coracle_base::explain::chain(&manager.start(&unit(), 1, Vec::new()).unwrap_err());
    assert!(error.contains("coracle-x.scope") && error.contains("dependency"), "{error}");
    drop(manager);
    served.join().unwrap();
}

#[test]
fn what_systemd_says_is_in_the_error() {
    let denied = "org.freedesktop.DBus.Error.AccessDenied";
    let (mut manager, served) = manager("done", Some(("SetUnitProperties", denied)));
    let error = manager.set(&unit(), &Vec::new()).unwrap_err();
    assert!(coracle_base::explain::chain(&error).contains("not so"));
    assert!(
        matches!(error, LaunchError::Cgroup { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    );
    manager.set(&unit(), &Vec::new()).unwrap();
    drop(manager);
    served.join().unwrap();
}

#[test]
fn a_unit_that_is_gone_is_stopped() {
    let (mut manager, served) = manager("done", Some(("StopUnit", NO_SUCH_UNIT)));
    manager.stop(&unit()).unwrap();
    manager.stop(&unit()).unwrap();
    drop(manager);
    let calls = served.join().unwrap();
    assert_eq!(calls.iter().filter(|call| call.member == "ResetFailedUnit").count(), 2);
}

#[test]
fn garbage_is_refused() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(b"OK 0\r\nB\x02\x00\x01 this is no message of D-Bus at all").unwrap();
    assert!(matches!(Bus::over(theirs, 0), Err(CallError::Lost(_))));
    for bytes in [&[][..], b"l", b"l\x01\x00\x01\xff\xff\xff\xff\x01\x00\x00\x00\xff\xff\xff\xff"] {
        assert!(wire::length(bytes).is_err());
    }
    assert!(wire::parse(b"l\x02\x00\x01\x00\x00\x00\x00\x01\x00\x00\x00\x08\x00\x00\x00\x05\x01u").is_err());
}

/// Ends with the test.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A real bus takes our authentication and our messages.
#[test]
fn the_distributions_message_bus_understands() {
    let dir = std::env::temp_dir().join(format!("coracle-bus-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let socket = dir.join("bus");
    let config = format!(
        "<busconfig><type>session</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>\
         <policy context='default'><allow send_destination='*'/><allow receive_sender='*'/><allow own='*'/></policy></busconfig>",
        socket.display()
    );
    std::fs::write(dir.join("config"), config).unwrap();
    let daemon = std::process::Command::new("/usr/bin/dbus-daemon")
        .args(["--nofork", "--print-address=1", "--config-file"])
        .arg(dir.join("config"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn();
    let mut daemon = match daemon {
        Ok(daemon) => Daemon(daemon),
        Err(error) => {
            println!("skipped: needs dbus-daemon (package dbus-daemon): {error}");
            return std::fs::remove_dir_all(&dir).unwrap();
        }
    };
    // It prints its address once it listens.
    let mut byte = [0];
    daemon.0.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    let mut manager = Manager { bus: Bus::connect(&socket, rustix::process::geteuid().as_raw()).unwrap() };
    manager.bus.listen("type='signal',member='JobRemoved'").unwrap();
    // Nobody is systemd on this bus; the bus has read the whole message to say so.
    let error =
        manager.set(&unit(), &vec![("X".to_owned(), Value::Texts(vec!["a".to_owned()]))]).unwrap_err();
    let text = coracle_base::explain::chain(&error);
    assert!(text.contains("org.freedesktop.systemd1"), "{text}");
    drop(daemon);
    std::fs::remove_dir_all(&dir).unwrap();
}
