package pager

import "machpager/pager/emm"

// Init attaches a vm to an object of the default pager's. Only one vm has an object at a time. InvalidArgument: not one of its objects, or not its page size;
// InvalidObject: it has ended; Failure: another vm has it.
func (p *Pager) Init(h emm.Head, pageSize int) emm.KernReturn {
	if h.Control == nil {
		return emm.InvalidArgument
	}
	o := p.lookup(h.Object)
	if o == nil || int64(pageSize) != o.pageSize {
		return emm.InvalidArgument
	}
	if kr := o.attach(h.Control); kr != emm.Success {
		return kr
	}
	attributes := p.attributes
	attributes.ClusterSize = max(attributes.ClusterSize, o.pageSize)
	kr := h.Control.ChangeAttributes(attributes, false)
	if kr != emm.Success {
		p.Terminate(h)
	}
	return kr
}

// attach makes control the object's, and gives it its cookie.
func (o *object) attach(control emm.Control) emm.KernReturn {
	a := &attachment{o: o, control: control}
	o.mu.Lock()
	switch {
	case o.doomed:
		o.mu.Unlock()
		return emm.InvalidObject
	case o.att != nil:
		o.mu.Unlock()
		return emm.Failure
	}
	o.att = a
	o.mu.Unlock()
	control.SetCookie(a)
	return emm.Success
}

// Create takes over a temporary object. It is ready at once. If an earlier pager had taken it over already, this is Init, for who does not know whether it
// lived to send Create; the object may have contents then.
func (p *Pager) Create(h emm.Head, object emm.Port, size int64, pageSize int) emm.KernReturn {
	if h.Control == nil {
		return emm.InvalidArgument
	}
	if o := p.lookup(object); o != nil && o.adopted && o.temporary && o.pageSize == int64(pageSize) {
		return o.attach(h.Control)
	}
	o, err := p.create(entry{port: object, size: size, pageSize: int64(pageSize), temporary: true})
	if err != nil {
		p.log.Error("take over temporary object", "size", size, "err", err)
		return kernReturn(err, emm.Failure)
	}
	return o.attach(h.Control)
}

// Terminate ends the vm's use of the object. A temporary object's contents end too.
func (p *Pager) Terminate(h emm.Head) emm.KernReturn {
	a := p.attached(h.Control)
	if a == nil {
		return emm.InvalidArgument
	}
	o := a.o
	o.mu.Lock()
	if o.att != a {
		o.mu.Unlock()
		return emm.InvalidArgument
	}
	o.detach()
	o.doomed = o.doomed || o.temporary
	end := o.doomed
	o.mu.Unlock()
	if end {
		p.end(o)
	}
	return emm.Success
}

// attached is what Init or Create left with the control, or nil.
func (p *Pager) attached(control emm.Control) *attachment {
	if control == nil {
		return nil
	}
	a, ok := control.Cookie().(*attachment)
	if !ok || a.o.p != p {
		return nil
	}
	return a
}
